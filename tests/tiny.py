"A Stable Diffusion pipeline of random weights, as small as it gets: for tests that need a model and not a good one."
import json, sys
from pathlib import Path

def tiny_tokenizer(length=16):
    from transformers import CLIPTokenizer
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in own] + [chr(256+i) for i in range(256-len(own))]
    vocab, merges = letters + [c+'</w>' for c in letters], []
    for word in 'red blue white yellow rose iris daisy sky meadow under a the in'.split():
        parts = [*word[:-1], word[-1]+'</w>']
        while len(parts) > 1:
            if (m := tuple(parts[:2])) not in merges: merges.append(m); vocab.append(''.join(m))
            parts = [''.join(m), *parts[2:]]
    vocab = [*dict.fromkeys(vocab), '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={v: i for i, v in enumerate(vocab)}, merges=merges, model_max_length=length)

def tiny_model(folder, size=32):
    "Write a pipeline that draws `size` pixels; different words give different pictures."
    import tempfile, torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from flowerdiff.components import TextEncoder, save_components, save_pipeline
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    tok = tiny_tokenizer()
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id))
    unet = UNet2DConditionModel(sample_size=size//2, layers_per_block=1, block_out_channels=(16, 32), down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
                                cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4, norm_num_groups=4, sample_size=size)
    scheduler = DPMSolverMultistepScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', prediction_type='v_prediction', steps_offset=1)
    with tempfile.TemporaryDirectory() as parts:
        save_components(parts, vae, TextEncoder(tok, text))
        save_pipeline(folder, unet, parts, scheduler)
    return Path(folder)

if __name__ == '__main__': print(tiny_model(sys.argv[1]))
