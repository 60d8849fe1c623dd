"""One module a chapter: EXERCISES, each with its cases. See lib/course/exercises.py."""
