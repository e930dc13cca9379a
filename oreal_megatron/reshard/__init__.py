"""Weight sync from the trainer's layout to the engine's; weight_sync.py is its face."""
