"""The conformance tests that any strategy package can run on itself. They need no file of this repository.

    pytest --pyargs cosmos3_pipeline.plugin_kit --strategy package:Class

docs/plugins.md lists the tests. The kit needs pytest; the library itself does not.
"""
