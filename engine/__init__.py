"""What any training needs, nothing of the method."""
