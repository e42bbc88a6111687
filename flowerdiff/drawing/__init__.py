"Draw with NumPy: noise, samplers, tokenizer, and pictures with their settings."
