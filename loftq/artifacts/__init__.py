"""The folder that a run writes: its staging, manifest and model card, and the checks of its contents."""
