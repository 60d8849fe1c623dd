"""The pictures: plotting draws measurements, drawing draws structures, in one style."""
