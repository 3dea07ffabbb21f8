"""The folder that a run writes: its staging, its manifest, its model card, and the checks of what is in it."""
