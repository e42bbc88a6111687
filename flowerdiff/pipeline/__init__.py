"Runs the stages in order, and the command line."
