"""How long tests wait for what may never come."""

# Seconds after which a process or a rank hangs. No test takes so long, on however busy a machine.
HANGS = 1200.0
