"""What any training needs and is not part of the method."""
