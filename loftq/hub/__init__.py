"""Where models and texts come from and where they go: folders, the Hub, the default model."""
