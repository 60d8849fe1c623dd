"""How the course is taught: everything that is not taught itself."""
