"From a folder of pictures to a deployed text-to-image model, in ten notebooks."
__version__ = "0.1.0"
