"Very small models with random weights, for tests that need a model but not a good one."

import gzip
import json
import sys
from pathlib import Path

UNET = dict(
    layers_per_block=1,
    block_out_channels=(16, 32),
    down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)  # of UNet2DConditionModel


def byte_letters():
    "Return the letter that byte-level BPE uses for each byte."
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in own] + [chr(256 + i) for i in range(256 - len(own))]


def add_word(letters, vocab, merges):
    "Add the merges that turn letters into a word, and their tokens."
    while len(letters) > 1:
        merge = tuple(letters[:2])
        if merge not in merges:
            merges.append(merge)
            vocab.append(''.join(merge))
        letters = [''.join(merge), *letters[2:]]


def tiny_tokenizer(length=16):
    "Return a CLIP tokenizer that knows a few words."
    from transformers import CLIPTokenizer

    letters = byte_letters()
    vocab = letters + [c + '</w>' for c in letters]
    merges = []
    for word in [
        'red',
        'blue',
        'white',
        'yellow',
        'rose',
        'iris',
        'daisy',
        'sky',
        'meadow',
        'under',
        'a',
        'the',
        'in',
    ]:
        add_word([*word[:-1], word[-1] + '</w>'], vocab, merges)
    vocab = [*dict.fromkeys(vocab), '<|startoftext|>', '<|endoftext|>']
    return CLIPTokenizer(vocab={v: i for i, v in enumerate(vocab)}, merges=merges, model_max_length=length)


def tiny_model(folder, size=32):
    "Write a pipeline for images of `size` pixels. Different words give different images."
    import tempfile

    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from flowerdiff.models.components import TextEncoder
    from flowerdiff.models.saving import save_components, save_pipeline

    torch.manual_seed(0)
    tok = tiny_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
        )
    )
    unet = UNet2DConditionModel(sample_size=size // 2, **UNET)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=size,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        prediction_type='v_prediction',
        steps_offset=1,
    )
    with tempfile.TemporaryDirectory() as parts:
        save_components(parts, vae, TextEncoder(tok, text))
        save_pipeline(folder, unet, parts, scheduler)
    return Path(folder)


SD1 = dict(
    unet=dict(block_out_channels=[16, 32, 64, 64], cross_attention_dim=32),
    vae=dict(block_out_channels=[4, 8, 16, 16]),
    text_encoder=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
)  # the sizes of `tiny_sd1`


def tiny_sd1(folder, rank=0, alpha=8.0):
    "Write a pipeline with Stable Diffusion 1's blocks and small sizes, and with a LoRA if `rank` is not 0."
    import tempfile

    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from flowerdiff.models.components import TextEncoder
    from flowerdiff.models.finetune import add_lora, merge_lora, save_lora
    from flowerdiff.models.saving import save_components, save_pipeline

    torch.manual_seed(0)
    tok = tiny_tokenizer(77)
    special = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    config = CLIPTextConfig(vocab_size=len(tok), intermediate_size=64, **special, **SD1['text_encoder'])
    text = CLIPTextModel(config)
    unet = UNet2DConditionModel(sample_size=8, norm_num_groups=8, **SD1['unet'])
    vae = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        **SD1['vae'],
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True, steps_offset=1
    )
    base = unet
    if rank:
        unet = add_lora(unet, rank, alpha)
        for name, parameter in unet.named_parameters():
            if 'lora_B' in name:
                torch.nn.init.normal_(parameter, std=0.1)
        base = merge_lora(unet)
    with tempfile.TemporaryDirectory() as parts:
        save_components(parts, vae, TextEncoder(tok, text))
        save_pipeline(folder, base, parts, scheduler)
    if rank:
        save_lora(unet, Path(folder) / 'lora')
    return Path(folder)


VOCABULARY = Path(__file__).parents[2] / 'shared' / 'data' / 'clip' / 'bpe_simple_vocab_16e6.txt.gz'


def clip_tokenizer():
    "Return CLIP's tokenizer with 77 positions, or a tiny one if the vocabulary is not available."
    from transformers import CLIPTokenizer

    if not VOCABULARY.exists():
        return tiny_tokenizer(77)
    letters = byte_letters()
    with gzip.open(VOCABULARY, 'rt') as f:
        lines = f.read().splitlines()[1:48895]
    merges = [tuple(line.split()) for line in lines]
    vocab = [
        *letters,
        *(c + '</w>' for c in letters),
        *map(''.join, merges),
        '<|startoftext|>',
        '<|endoftext|>',
    ]
    return CLIPTokenizer(vocab={v: i for i, v in enumerate(vocab)}, merges=merges, model_max_length=77)


def tiny_clip(folder, seed=0, halves=2):
    "Write a CLIP as in OpenAI's repositories: the whole model, or its text half, with the tokenizer."
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

    torch.manual_seed(seed)
    tok = clip_tokenizer()
    how = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    text = CLIPTextConfig(
        vocab_size=len(tok),
        max_position_embeddings=77,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        **how,
    )
    model = (
        CLIPModel(
            CLIPConfig(
                text_config=text.to_dict(),
                vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **how).to_dict(),
                projection_dim=32,
            )
        )
        if halves == 2
        else CLIPTextModel(text)
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return Path(folder)


def tiny_vae(folder=None, factor=8, seed=0):
    "Return an AutoencoderKL with this downsampling factor, and write it to a folder if there is one."
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    n = factor.bit_length()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16)[-n:],
        down_block_types=('DownEncoderBlock2D',) * n,
        up_block_types=('UpDecoderBlock2D',) * n,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    if folder:
        vae.save_pretrained(folder)
    return vae


def tiny_stable_diffusion(folder, clip, size=64):
    "Write a pipeline as Stable Diffusion 1.4 has it, with the text half of the CLIP in the folder `clip`."
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    whole = CLIPModel.from_pretrained(clip)
    text = CLIPTextModel(whole.config.text_config)
    text.load_state_dict(whole.text_model.state_dict())
    unet = UNet2DConditionModel(sample_size=size // 8, **UNET)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        tiny_vae(),
        text,
        CLIPTokenizer.from_pretrained(clip),
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    file = Path(folder) / 'scheduler' / 'scheduler_config.json'
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: v for k, v in config.items() if k not in ('prediction_type', 'timestep_spacing')})
    )  # which its first version did not have
    return Path(folder)


WORDS = [
    'a',
    'the',
    'flower',
    'flowers',
    'pink',
    'yellow',
    'red',
    'white',
    'petals',
    'leaves',
    'green',
    'with',
    'in',
    'of',
    'and',
    'close',
    'up',
    'sky',
    'meadow',
    'grass',
    'bee',
    'stem',
    'bud',
]


def tiny_florence(folder, side=64, seed=0):
    "Write a Florence-2 in the official layout. It answers with words that depend on the picture."
    from transformers import BartTokenizer, CLIPImageProcessorPil, Florence2Processor

    from flowerdiff.selftest.model_parts import tiny_florence as random_florence

    letters = byte_letters()
    vocab, merges = [], []
    for word in WORDS:
        add_word(['\u0120', *word], vocab, merges)
    names = list(dict.fromkeys(['<s>', '<pad>', '</s>', '<unk>', *letters, *vocab, '<mask>']))
    tok = BartTokenizer(
        vocab={v: i for i, v in enumerate(names)},
        merges=merges,
        extra_special_tokens=dict(image_token='<image>'),
        model_max_length=128,
    )
    sizes = dict(max_position_embeddings=128, forced_eos_token_id=2)
    model = random_florence(len(tok), tok.image_token_id, seed, **sizes)
    words = {names.index('\u0120' + w) for w in WORDS}
    model.generation_config.update(
        suppress_tokens=[i for i in range(len(tok)) if i not in words | {2}],
        no_repeat_ngram_size=2,
        exponential_decay_length_penalty=(1, 1.15),
    )  # words only, and outputs of several lengths
    images = CLIPImageProcessorPil(size=dict(height=side, width=side), do_center_crop=False)
    images.image_seq_length = (side // 32) ** 2 + 1
    kinds = (
        'ocr',
        'phrase_grounding',
        'pure_text',
        'description_with_bboxes',
        'description_with_polygons',
        'polygons',
        'bboxes',
        'description_with_bboxes_or_polygons',
    )
    model.save_pretrained(folder)
    Florence2Processor(images, tok, post_processor_config={k: {} for k in kinds}).save_pretrained(folder)
    return Path(folder)


if __name__ == '__main__':
    print(tiny_model(sys.argv[1]))
