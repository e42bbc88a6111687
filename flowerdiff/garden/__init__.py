"The data set that the library draws: flowers with captions."
