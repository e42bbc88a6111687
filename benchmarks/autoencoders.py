"""Compare autoencoders on real photographs that none of them was trained on.

    python benchmarks/autoencoders.py --pictures shared/data/flowers/images --also shared/data/taesd

Without the pictures it says so and ends.
"""

import argparse
from pathlib import Path

import numpy as np

from flowerdiff.data.images import load_picture
from flowerdiff.models.autoencoder_choice import compare


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--pictures', type=Path, required=True, help='a folder of photographs')
    parser.add_argument('--also', nargs='*', default=[], help='more autoencoders: folders or org/name@commit')
    parser.add_argument('--count', type=int, default=256)
    args = parser.parse_args()
    files = sorted(args.pictures.rglob('*.jpg'))
    if not files:
        raise SystemExit(f'{args.pictures}: holds no pictures; skipped')
    files = files[:: max(1, len(files) // args.count)][: args.count]
    names = ['garden', 'photo', *(spec for spec in args.also if '@' in spec or Path(spec).is_dir())]
    for side in (64, 128):
        pictures = np.stack([np.asarray(load_picture(file, side).image) for file in files])
        print(f'{len(pictures)} pictures at {side} px')
        print(*compare(pictures, names).lines(), sep='\n')


if __name__ == '__main__':
    main()
