"""Artifacts side by side: what was measured, the charts, the page."""
