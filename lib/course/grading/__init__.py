"""Grade a folder of notebooks, so that no accident costs more than its exercise."""
