"""Processes and files: distributed helpers, launcher, heartbeat, watchdog, preemption, versions, exit codes."""
