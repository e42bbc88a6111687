"""Draw prompts that people would type, and count which pictures show what was asked for.

    python benchmarks/free_prompts.py WORKSPACE OUT [--prompts FILE] [--classifier FOLDER]

Each of the 280 prompts of `free_prompts.jsonl` is drawn twice, and the attribute classifier looks at each
picture. It is right if all that the prompt asks for is in it (species, colors, place, count, size, petals,
leaves, buds) and nothing that it denies. A prompt for an unknown thing is right if the model names it as not
learned. Prints a table by kind of prompt, and writes it to OUT with a sheet for each kind: a green
frame is right, a red one wrong, a gray one not checked.

The bundled classifier of the workspace's garden looks, or one of your own (`--classifier`, see
`garden_networks.py`). That of the classic garden has fewer colors, and a maroon rose is right if it is red.
Prompts about what it cannot see are not checked, and counted in the last column.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from PIL import ImageOps

PROMPTS = Path(__file__).with_name('free_prompts.jsonl')
PER_PROMPT = 2
PAIRED = ('species', 'color')


def read_prompts(file: Path) -> list:
    "Read prompts, a JSON object per line: kind, prompt, must."
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines() if line.strip()]


def in_colors(must: dict, colors: list) -> dict:
    "Replace a color that a garden does not have by the nearest that it has."
    from flowerdiff.garden.words import NEAREST_COLORS

    def nearest(value):
        return value if value in colors else NEAREST_COLORS.get(value, value)

    return {key: nearest(value) if key.endswith('color') else value for key, value in must.items()}


def can_see(must: dict, attributes: dict) -> bool:
    "Whether a classifier with these attributes can decide whether a picture shows what it must."
    for key, value in must.items():
        name = key.removeprefix('not ').removeprefix('least ')
        known = attributes.get('background' if name == 'place' and 'place' not in attributes else name)
        if known is None or (not key.startswith('least ') and value not in known):
            return False
    return True


def found_pairs(found: dict) -> list:  # of (species, color), one or two
    "Return the kinds of flowers that a classifier sees."
    pairs = [tuple(found.get(which + name, 'none') for name in PAIRED) for which in ('', 'other_')]
    return [pair for pair in pairs if pair[0] != 'none']


def fits_pair(wanted: tuple, pair: tuple) -> bool:
    return all(w is None or w == p for w, p in zip(wanted, pair))


def shows_kinds(must: dict, found: dict) -> bool:
    "Whether the flowers are of the wanted kinds, in any order, and of no kind more."
    wanted = [tuple(must.get(which + name) for name in PAIRED) for which in ('', 'other_')]
    wanted = [pair for pair in wanted if any(pair)]
    pairs = found_pairs(found)
    if not wanted:
        return True
    if len(wanted) == 1:
        return all(fits_pair(wanted[0], pair) for pair in pairs)
    orders = (pairs, pairs[::-1])
    return len(pairs) == 2 and any(all(map(fits_pair, wanted, order)) for order in orders)


def seen(name: str, found: dict) -> list:
    "Return the values of an attribute that a classifier sees, of both kinds of flowers."
    if name in PAIRED:
        return [pair[PAIRED.index(name)] for pair in found_pairs(found)]
    return [found[name]]


def shows(must: dict, found: dict) -> bool:
    "Whether a picture shows what a prompt asks for, by the attributes that a classifier found."
    found = {'place': found.get('background'), **found}
    if not shows_kinds(must, found):
        return False
    for key, value in must.items():
        word, _, name = key.rpartition(' ')
        if word == 'not':
            if value in seen(name, found):
                return False
        elif word == 'least':
            if found[name] < value:
                return False
        elif name.removeprefix('other_') not in PAIRED and found[name] != value:
            return False
    return True


def draw_prompts(generator, prompts: list, seed: int) -> list:  # of lists of pictures
    "Draw each prompt a few times. The progress is printed."
    pictures = []
    for i, row in enumerate(prompts):
        pictures.append(generator(row['prompt'], num_images_per_prompt=PER_PROMPT, seed=seed + 100 * i))
        if (i + 1) % 40 == 0:
            print(f'{i + 1} of {len(prompts)} prompts drawn', flush=True)
    return pictures


def check(row: dict, pictures: list, generator, classifier) -> list | None:  # of bool; None: cannot be seen
    "Return for each picture of a prompt whether it is right."
    must = row['must']
    if 'unknown' in must:
        named = any(line.startswith(f'{must["unknown"]}:') for line in generator.unknown_words(row['prompt']))
        return [named] * len(pictures)
    must = in_colors(must, classifier.attributes['color'])
    if not can_see(must, classifier.attributes):
        return None
    return [shows(must, found) for found in classifier.names(pictures)]


def framed(picture, right: bool | None):
    color = {True: 'green', False: 'red', None: 'gray'}[right]
    return ImageOps.expand(picture, 2, color)


def table(rows: list) -> str:  # rows with `kind` and `right`
    "Count the right pictures of each kind of prompt, as a Markdown table."
    lines = ['| kind | right | pictures | prompts not checked |', '|---|---|---|---|']
    kinds = list(dict.fromkeys(row['kind'] for row in rows))
    for kind in (*kinds, 'all'):
        own = [row for row in rows if kind in (row['kind'], 'all')]
        answers = [right for row in own for right in row['right'] or ()]
        share = f'{sum(answers) / len(answers):.0%}' if answers else ''
        lines.append(f'| {kind} | {share} | {len(answers)} | {sum(row["right"] is None for row in own)} |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('workspace', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--prompts', type=Path, default=PROMPTS)
    parser.add_argument('--classifier', type=Path)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()

    from flowerdiff import Generator
    from flowerdiff.core.workspace import read_workspace
    from flowerdiff.garden.worlds import WORLDS
    from flowerdiff.inference.generator import montage
    from flowerdiff.models.attribute_classifier import load_classifier

    args.out.mkdir(parents=True, exist_ok=True)
    world = WORLDS[read_workspace(args.workspace).settings.prepare.garden]
    classifier = load_classifier(args.classifier or world.bundled)
    generator = Generator.from_pretrained(args.workspace)
    rows = read_prompts(args.prompts)
    sheets = defaultdict(list)
    with open(args.out / 'answers.jsonl', 'w', encoding='utf-8') as file:
        for row, pictures in zip(rows, draw_prompts(generator, rows, args.seed)):
            row['right'] = check(row, pictures, generator, classifier)
            file.write(json.dumps(row | dict(found=classifier.names(pictures))) + '\n')
            answers = row['right'] or [None] * len(pictures)
            sheets[row['kind']] += map(framed, pictures, answers)
    for kind, pictures in sheets.items():
        montage(pictures, columns=12).save(args.out / f'{kind.replace(" ", "_")}.png')
    text = table(rows)
    (args.out / 'table.md').write_text(f'{text}\n', encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
