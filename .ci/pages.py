"""The pages of the docs site, in _proc/: nbdev's processed notebooks, and what Quarto lacks in them.

Pictures get a text for those who cannot see them, widgets their script from this site, links to files outside
the site lead to GitHub, and stages and tutorials open in Colab.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

from flowerdiff.apps.web_page import NpmPackage, fetch_npm

STATE = 'application/vnd.jupyter.widget-state+json'
VIEW = 'application/vnd.jupyter.widget-view+json'
WIDGETS = NpmPackage(
    'https://registry.npmjs.org/@jupyter-widgets/html-manager/-/html-manager-1.0.15.tgz',
    '2b9d65cb7913e1c7d671757a10008b32c9c2448d4429513371e55c07d6107638',
    ('package/dist/embed.js', 'package/dist/embed.js.LICENSE.txt'),
)
ALT = 300  # characters
FENCED = re.compile(r'(```.*?```)', re.S)


def joined(text: str | list) -> str:
    return ''.join(text)


def outputs(cells: list) -> list[dict]:
    "The displayed data of all cells: mime type -> content."
    return [o['data'] for c in cells for o in c.get('outputs', []) if 'data' in o]


# ---- pictures


def plain(text: str) -> str:
    "Markdown without its marks, on one line."
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[`*$\[\]]|<[^>]*>|\\', '', text).split())


def shortened(text: str) -> str:
    "The last sentences of a text: they stand before the picture."
    kept = ''
    for sentence in reversed(re.split(r'(?<=[.:?!]) ', text)):
        if kept and len(kept) + len(sentence) > ALT:
            break
        kept = f'{sentence} {kept}'.strip()
    return kept.rstrip(':')


def describe_pictures(cells: list, description: str):
    "Give the pictures of each cell the text that introduces them, unless the cell has `fig-alt`."
    text = plain(description)
    for cell in cells:
        source = joined(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts = [p for p in FENCED.sub('', source).split('\n\n') if re.match(r'\s*[^\s#|<!]', p)]
            text = plain(parts[-1]) if parts else text
        pictures = [d for d in outputs([cell]) if any(kind.startswith('image/') for kind in d)]
        if pictures and not re.search(r'^#\|\s*fig-alt:', source, re.M):
            alt = [shortened(text)] * len(pictures)
            value = json.dumps(alt if len(alt) > 1 else alt[0], ensure_ascii=False)
            cell['source'] = f'#| fig-alt: {value}\n{source}'


# ---- widgets


def script(kind: str, content) -> str:
    text = json.dumps(content).replace('</', '<\\/')  # would end the script
    return f'<script type="{kind}">{text}</script>'


def show_widgets(nb: dict, up: str):
    "Widgets as HTML that shows itself with the script of this site, not with one of a CDN."
    state = nb['metadata'].pop('widgets', {}).get(STATE)
    first = True
    for data in outputs(nb['cells']):
        if view := data.pop(VIEW, None):
            before = (
                f'{script(STATE, state)}<script src="{up}vendor/embed.js" defer></script>' if first else ''
            )
            data['text/html'] = f'{before}<div class="widget">{script(VIEW, view)}</div>'
            first = False


# ---- headings and links


def lower_headings(cells: list):
    "Outputs have no headings of the page's own levels."
    for data in outputs(c for c in cells if 'show_doc' not in joined(c['source'])):
        if 'text/markdown' in data:
            parts = FENCED.split(joined(data['text/markdown']))
            parts[::2] = [re.sub(r'^(#+) ', r'###\1 ', part, flags=re.M) for part in parts[::2]]
            data['text/markdown'] = ''.join(parts)
        if 'text/html' in data:
            data['text/html'] = re.sub(r'(</?)h1\b', r'\1h2', joined(data['text/html']))


def map_links(text: str, change: Callable) -> str:
    "Replace each Markdown link outside of code blocks by `change(words, address)`."
    parts = FENCED.split(text)
    link = re.compile(r'(?<![!\]])\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)')
    parts[::2] = [link.sub(lambda m: change(m[1], m[2]), part) for part in parts[::2]]
    return ''.join(parts)


class Links:
    "What a link of a page should say: relative within the site, absolute outside, none to what is not there."

    def __init__(self, pages: dict[str, dict], config):
        self.site = f'{config.doc_host}{config.doc_baseurl}/'
        self.blob = f'{config.git_url}/blob/{config.branch}/'
        self.anchors = {address(page, nb): anchors(nb) for page, nb in pages.items()}

    def mend(self, page: str, words: str, to: str) -> str:
        "Return the Markdown of a link."
        if to.startswith(self.site):
            target, _, anchor = to.removeprefix(self.site).partition('#')
            if anchor and anchor not in self.anchors.get(target, [anchor]):
                return words
            to = os.path.relpath(target, os.path.dirname(page) or '.') + (f'#{anchor}' if anchor else '')
        elif not re.match(r'[a-z]+:|#', to):
            target = os.path.normpath(os.path.join('nbs', os.path.dirname(page), to))
            if not target.startswith('nbs/'):
                to = self.blob + target
        return f'[{words}]({to})'


def address(page: str, nb: dict) -> str:
    "The page's file on the site."
    name = front_matter(nb).get('output-file', Path(page).with_suffix('.html').name)
    return os.path.join(os.path.dirname(page), name)


def anchors(nb: dict) -> set[str]:
    "The headings of a page and of the definitions that it shows, as Quarto names them."
    texts = [joined(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown']
    texts += [joined(d.get('text/markdown', '')) for d in outputs(nb['cells'])]
    headings = re.findall(r'^#+ (.*)$', '\n'.join(texts), re.M)
    return {re.sub(r'[^\w\s.-]', '', plain(h)).strip().lower().replace(' ', '-') for h in headings}


def mend_links(page: str, nb: dict, links: Links):
    "Mend the links of a page's text and of its outputs."

    def mend(text):
        # nbdev makes a link of a name in a link's words: the outer one counts
        text = re.sub(r'\[\[(`[^`\]]*`)\]\([^)]*\)\]\(', r'[\1](', joined(text))
        return map_links(text, lambda words, to: links.mend(page, words, to))

    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = mend(cell['source'])
    for data in outputs(nb['cells']):
        if 'text/markdown' in data:
            data['text/markdown'] = mend(data['text/markdown'])


# ---- pages


def front_matter(nb: dict) -> dict:
    first = nb['cells'][0]
    return (
        yaml.safe_load(joined(first['source']).strip().strip('-')) or {}
        if first['cell_type'] == 'raw'
        else {}
    )


def colab_link(page: str, config) -> dict:
    "The cell that opens a page in Colab."
    where = f'{config.user}/{config.repo}/blob/{config.branch}/nbs/{page}'
    text = f'[Open in Colab](https://colab.research.google.com/github/{where}){{.colab}}'
    return dict(cell_type='markdown', id='colab', metadata={}, source=text)


def finish(page: str, nb: dict, links: Links, config):
    "Change a processed notebook in place."
    describe_pictures(nb['cells'], front_matter(nb).get('description', ''))
    show_widgets(nb, '../' * page.count('/'))
    lower_headings(nb['cells'])
    mend_links(page, nb, links)
    if page.startswith(('stages/', 'tutorials/')):
        nb['cells'].insert(1, colab_link(page, config))


def main():
    "Make the pages. `--vendor` also downloads the script of the widgets."
    config = get_config()
    folder = Path(proc_nbs(force=True))
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob('*.ipynb'))}
    pages = {page: json.loads(path.read_text(encoding='utf-8')) for page, path in files.items()}
    links = Links(pages, config)
    for page, nb in pages.items():
        finish(page, nb, links, config)
        files[page].write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    if '--vendor' in sys.argv:
        (folder / 'vendor').mkdir()
        fetch_npm(WIDGETS, folder / 'vendor')
    print(folder)


if __name__ == '__main__':
    main()
