"The studio and the Space."
