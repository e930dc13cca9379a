"""Run folder, metrics, timers, dumps, progress and reports."""
