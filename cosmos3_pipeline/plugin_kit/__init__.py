"""The conformance tests that any strategy package can run on itself. They need no file of this repository.

    pytest --pyargs cosmos3_pipeline.plugin_kit --strategy package:Class

docs/plugins.md says what is tested. Needs pytest, which the library itself does not.
"""
