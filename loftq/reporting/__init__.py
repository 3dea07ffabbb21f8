"""The report that compares artifacts: their measured values, the charts, and the page."""
