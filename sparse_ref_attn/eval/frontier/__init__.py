"""The frontier: what every candidate loses on the small model, over the work that it saves on published ones."""
