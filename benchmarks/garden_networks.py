"""Train the networks of a garden: a CLIP, an autoencoder, the attribute classifier.

    python benchmarks/garden_networks.py OUT clip --minutes 120
    python benchmarks/garden_networks.py OUT autoencoder --minutes 240 --channels 12 --equivariance 0.25
    python benchmarks/garden_networks.py OUT classifier --steps 4000

OUT gets a folder for each network, in the layout of the bundled ones, and one with the pictures. A killed
training goes on where its state was last saved, every five minutes: start the same command again. It uses one
core. Its lines say how far it is. The last ones are measured on pictures that it was not trained on.
`--world classic` trains networks for the garden of today. The autoencoder is trained before the classifier,
which then also learns from decoded pictures.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np

SEEDS = dict(train=1000, classifier=2000, test=3000)
PER_PICTURE = 6  # captions of a training picture
TESTED = 1000
LONGEST_PIECE = 3


def say(line: str):
    print(line, flush=True)


def draw(world, seed: int, count: int, folder: Path) -> tuple:  # pictures [count, 64, 64, 3], attributes
    "Draw pictures, or read those that are drawn already."
    attributes = [world.sample(seed, i) for i in range(count)]
    file = folder / f'{seed}-{count}.npy'
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix('.fresh.npy')
        pictures = np.lib.format.open_memmap(fresh, 'w+', np.uint8, (count, 64, 64, 3))
        for i, own in enumerate(attributes):
            pictures[i] = np.asarray(world.draw(own, seed, i, 64))
            if (i + 1) % 5000 == 0:
                say(f'{i + 1:,} of {count:,} pictures drawn')
        pictures.flush()
        fresh.rename(file)
    return np.load(file, mmap_mode='c'), attributes


def levels(world_name: str) -> dict:  # attribute -> its values
    "Return the attributes that the networks learn."
    from flowerdiff.garden.flower_shapes import COLORS, SPECIES
    from flowerdiff.garden.garden import BACKGROUNDS
    from flowerdiff.garden.mixed_garden import CLASSIFIED

    if world_name == 'mixed':
        return CLASSIFIED
    return dict(species=list(SPECIES), color=list(COLORS), background=list(BACKGROUNDS), count=[1, 3])


def write_captions(world, attributes: list, seed: int) -> tuple:  # sentences, what each of them states
    "Write captions of each picture, and misspelled ones too."
    from flowerdiff.garden.misspelling import misspelled

    sentences = []
    stated = []
    for i, own in enumerate(attributes):
        rng = random.Random(f'{seed} {i}')
        texts, facts = zip(*(world.caption(own, rng) for _ in range(PER_PICTURE)))
        wrong = misspelled(list(texts[: PER_PICTURE // 2]), f'{seed} {i}')
        sentences.append([*texts, *wrong])
        stated.append([*facts, *facts[: len(wrong)]])
    return sentences, stated


def find_tokenizer(folder: Path, sentences: list):
    "Train the tokenizer, or load that of the training that goes on, or of the CLIP to start from."
    from transformers import CLIPTokenizer

    from flowerdiff.models.tokenizer import own_tokenizer

    if (folder / 'tokenizer.json').exists():
        return CLIPTokenizer.from_pretrained(folder)
    texts = [text for own in sentences for text in own]
    tokenizer = own_tokenizer(texts, LONGEST_PIECE)
    tokenizer.save_pretrained(folder)
    return tokenizer


def probe_sentences(attributes: list) -> list:
    "Write the sentences of the probe: true ones, and the same with one thing changed."
    from flowerdiff.garden.captions import changed_captions
    from flowerdiff.garden.misspelling import misspell

    sentences = []
    for i, own in enumerate(attributes):
        changes = changed_captions(own, random.Random(i))
        changes['misspelled color'] = tuple(misspell(text, random.Random(i)) for text in changes['color'])
        sentences.append(changes)
    return sentences


def train_clip(args, world, pictures, attributes):
    "Train a CLIP, and say which changes of a caption it notices."
    from transformers import CLIPModel

    from flowerdiff.models.clip import train_clip
    from flowerdiff.models.clip_retrieval import probe
    from flowerdiff.models.tokenizer import encode_attributes

    sentences, stated = write_captions(world, attributes, SEEDS['train'])
    tokenizer = find_tokenizer(args.start or args.out / 'state/tokenizer', sentences)
    say(f'{len(tokenizer)} tokens, {tokenizer.model_max_length} positions')
    facts = encode_attributes(stated, attributes, levels(args.world))
    start = args.start and CLIPModel.from_pretrained(args.start, attn_implementation='eager').float()
    if args.freeze_images:
        start.vision_model.requires_grad_(False)
        start.visual_projection.requires_grad_(False)
    model, tokenizer = train_clip(
        pictures,
        sentences,
        args.out / 'clip',
        tokenizer=tokenizer,
        minutes=args.minutes,
        steps=args.steps,
        attributes=facts,
        width=args.width or 128,
        layers=args.layers,
        lr=args.lr or 1.4e-3,
        start=start,
        progress=say,
        resume=args.out / 'state/clip.safetensors',
    )
    if args.world == 'mixed':
        tested, shown = draw(world, SEEDS['test'], min(TESTED, args.pictures), args.out / 'pictures')
        found = probe(model, tokenizer, tested, probe_sentences(shown))
        for change, (share, count) in found.items():
            say(f'probe {change:<17} {share:.1%} of {count}')
        (args.out / 'probe.json').write_text(json.dumps(found, indent=1), encoding='utf-8')


def train_autoencoder(args, world, pictures, attributes):
    "Train an autoencoder, and measure its reconstructions and how fine the structure of its latents is."
    from flowerdiff.models import tiny_autoencoder as tiny

    model = tiny.train_autoencoder(
        pictures,
        args.out / 'autoencoder',
        minutes=args.minutes,
        steps=args.steps,
        width=args.width or 48,
        latent_channels=args.channels,
        equivariance=args.equivariance,
        held_out=min(256, len(pictures) // 4),
        progress=say,
        resume=args.out / 'state/autoencoder.safetensors',
    )
    tested, _ = draw(world, SEEDS['test'], min(TESTED, args.pictures), args.out / 'pictures')
    share = tiny.high_frequency_share(tiny.encode_all(model, tested))
    say(f'{tiny.reconstruction_psnr(model, tested):.2f} dB, fine structure {share:.3f}')


def train_classifier(args, world, pictures, attributes):
    "Train the attribute classifier, and measure its accuracy."
    from diffusers import AutoencoderTiny

    from flowerdiff.models.attribute_classifier import load_classifier, round_trips, train_classifier

    folder = args.out / 'autoencoder'
    if folder.exists():
        half = len(pictures) // 2
        decoded = round_trips(pictures[:half], AutoencoderTiny.from_pretrained(folder).eval())
        pictures = np.concatenate([pictures, decoded])
        attributes = attributes + attributes[:half]
    model = train_classifier(
        pictures,
        attributes,
        levels(args.world),
        args.out / 'classifier',
        steps=args.steps or 700,
        width=args.width or 32,
        kinds=2 if args.world == 'mixed' else 0,
        lr=args.lr or 2e-3,
        start=args.start and load_classifier(args.start),
        progress=say,
        resume=args.out / 'state/classifier.safetensors',
    )
    tested, shown = draw(world, SEEDS['test'], min(TESTED, args.pictures), args.out / 'pictures')
    from flowerdiff.models.tiny_autoencoder import to_tensor

    predicted = [
        name for i in range(0, len(tested), 100) for name in model.names(to_tensor(tested[i : i + 100]))
    ]
    for name in model.attributes:
        say(f'{name:<14} {np.mean([p[name] == own[name] for p, own in zip(predicted, shown)]):.1%}')


TRAININGS = dict(clip=train_clip, autoencoder=train_autoencoder, classifier=train_classifier)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path)
    parser.add_argument('network', choices=TRAININGS)
    parser.add_argument('--world', default='mixed', choices=('mixed', 'classic'))
    parser.add_argument('--pictures', type=int, default=24_000)
    parser.add_argument(
        '--minutes', type=float, default=60.0, help='of training; the classifier counts steps'
    )
    parser.add_argument('--steps', type=int, help='instead of minutes')
    parser.add_argument('--width', type=int, help='of the network')
    parser.add_argument('--layers', type=int, default=3, help='of the CLIP')
    parser.add_argument('--lr', type=float, help='of the CLIP or the classifier')
    parser.add_argument(
        '--start', type=Path, help='CLIP or classifier that was trained before, to go on from'
    )
    parser.add_argument(
        '--freeze-images',
        action='store_true',
        help='of the CLIP to start from: the metrics that it measures stay comparable',
    )
    parser.add_argument('--channels', type=int, default=4, help='of the latents')
    parser.add_argument('--equivariance', type=float, default=0.0, help='weight of the scale loss')
    args = parser.parse_args()
    if args.freeze_images and not args.start:
        parser.error('--freeze-images needs --start')

    import torch

    from flowerdiff.garden.worlds import WORLDS

    torch.set_num_threads(1)
    world = WORLDS[args.world]
    seed = SEEDS['classifier' if args.network == 'classifier' else 'train']
    pictures, attributes = draw(world, seed, args.pictures, args.out / 'pictures')
    TRAININGS[args.network](args, world, pictures, attributes)


if __name__ == '__main__':
    main()
