"""Pages of HTML that need nothing beside themselves, and the one that shows runs of the recipe."""
