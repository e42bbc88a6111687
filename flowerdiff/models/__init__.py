"The networks: text encoders, autoencoders, the classifier and the diffusion model."
