"From a prompt to images: sampling loop, backends and the `Generator`."
