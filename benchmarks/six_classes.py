"""Train on 600 photographs of six classes with default settings, as a new user would.

    python benchmarks/six_classes.py FLOWERS WORKSPACE

FLOWERS holds the pictures of Oxford 102 and a metadata.jsonl with `file_name`, `class_name` and `captions`.
Prints a line per stage and the report's verdict, and writes WORKSPACE.jpg: eight pictures of each class,
drawn from its name alone. Run it on an idle machine: the claim is at most 45 minutes on 2 cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from flowerdiff import Generator
from flowerdiff.core.files import read_json
from flowerdiff.core.workspace import read_jsonl
from flowerdiff.evaluation.class_recognition import class_prompt
from flowerdiff.inference.generator import montage

CLASSES = ('passion flower', 'water lily', 'rose', 'frangipani', 'bougainvillea', 'barbeton daisy')


def make_folder(flowers: Path, folder: Path):
    "Copy the first 100 pictures of each class, with their ten captions, into folders with the class's name."
    counts = dict.fromkeys(CLASSES, 0)
    with open(folder / 'metadata.jsonl', 'w', encoding='utf-8') as file:
        for row in read_jsonl(flowers / 'metadata.jsonl'):
            name = row['class_name']
            if counts.get(name, 100) == 100:
                continue
            counts[name] += 1
            target = folder / name / Path(row['file_name']).name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(flowers / row['file_name'], target)
            row = dict(file_name=str(target.relative_to(folder)), captions=row['captions'])
            file.write(json.dumps(row) + '\n')


def draw(workspace: Path):
    "Draw eight pictures of each class."
    generator = Generator.from_pretrained(workspace)
    prompts = [class_prompt(name) for name in sorted(CLASSES)]
    images = [image for prompt in prompts for image in generator(prompt, num_images_per_prompt=8, seed=0)]
    montage(images, columns=8, size=96).save(f'{workspace}.jpg', quality=88)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('flowers', type=Path)
    parser.add_argument('workspace', type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(args.flowers, Path(folder))
        command = [sys.executable, '-P', '-m', 'flowerdiff.pipeline.cli', 'run', args.workspace]
        done = subprocess.run([*command, '--pictures', folder])
    if done.returncode:
        sys.exit(done.returncode)
    records = [read_json(file) for file in (args.workspace / 'work/records').glob('*.json')]
    print('\n| stage | seconds | what came out |\n|---|---|---|')
    for record in sorted(records, key=lambda record: record['finished']):
        print(f'| {record["stage"]} | {record["seconds"]:.0f} | {record["summary"]} |')
    print(f'| total | {sum(record["seconds"] for record in records):.0f} | |')
    draw(args.workspace)


if __name__ == '__main__':
    main()
