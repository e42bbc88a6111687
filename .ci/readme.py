"""README.md from nbs/index.ipynb.

Markdown stays as it is, code comes with its text outputs, and links are as they are from the root of the
repository.
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]


def from_root(text: str) -> str:
    "Relative links of nbs/, seen from the folder above."
    return re.sub(r'(\]\(|src="|href=")(?![a-z]+:|#|/)', r'\1nbs/', text).replace('nbs/../', '')


def without_tabs(text: str) -> str:
    "The tabs of the site are sections of README.md."
    return re.sub(r'^:::.*\n+', '', text, flags=re.M)


def code(cell) -> str:
    "A code cell as a fenced block, its text outputs in another one."
    lines = [line for line in cell.source.splitlines() if not re.match(r'#\s*\|', line)]
    texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.outputs]
    shown = [
        f'```python\n{chr(10).join(lines).strip()}\n```',
        *(f'```\n{t.rstrip()}\n```' for t in texts if t.strip()),
    ]
    return '\n\n'.join(shown)


def readme() -> str:
    "What README.md should be."
    nb = nbformat.read(ROOT / 'nbs/index.ipynb', 4)
    parts = ['<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->']
    for cell in nb.cells:
        if re.search(r'^#\s*\|\s*hide', cell.source, re.M):
            continue
        if cell.cell_type == 'markdown':
            parts.append(from_root(without_tabs(cell.source.strip())))
        if cell.cell_type == 'code':
            parts.append(code(cell))
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__':
    target = ROOT / 'README.md'
    if '--check' not in sys.argv:
        target.write_text(readme(), encoding='utf-8')
    elif not target.exists() or target.read_text(encoding='utf-8') != readme():
        sys.exit('README.md is not what nbs/index.ipynb says: run python .ci/readme.py')
