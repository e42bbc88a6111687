"The site as it is handed to Quarto, made once for real. Its settings and examples, too."

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p.relative_to(ROOT / 'nbs')
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    if '.ipynb_checkpoints' not in p.parts
)


def cells(path):
    return json.loads(path.read_text())['cells']


def source(c):
    return ''.join(c['source'])


def kind(c, *names):
    return re.search(rf'^#\s*\|\s*({"|".join(names)})\b', source(c), re.M)


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    "What `.ci/docs` gives to Quarto, made from a copy of the repository."
    root = tmp_path_factory.mktemp('site')
    for part in ('nbs', 'flowerdiff', 'tests', '.ci'):
        shutil.copytree(
            ROOT / part, root / part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        )
    for part in ('settings.ini', '_quarto.yml', 'README.md'):
        shutil.copy(ROOT / part, root)
    done = subprocess.run(
        [sys.executable, '.ci/pages.py'],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'},
    )
    assert (
        not done.returncode and 'Traceback' not in done.stderr and 'Error in' not in done.stdout + done.stderr
    ), (done.stdout + done.stderr)[-3000:]
    return Path(done.stdout.split()[-1])


def test_every_page_is_made(site):
    assert [n for n in NOTEBOOKS if not (site / n).exists()] == []
    for n in NOTEBOOKS:
        if n.name == 'app.ipynb':
            continue
        front = yaml.safe_load(source(cells(site / n)[0]).strip().strip('-'))
        assert front.get('title') and front.get('description'), (
            n
        )  # its first cell became the head of the page
    names = [
        (n.parent, yaml.safe_load(source(cells(site / n)[0]).strip().strip('-')).get('output-file', n.stem))
        for n in NOTEBOOKS
        if n.name != 'app.ipynb'
    ]
    assert len(names) == len(set(names)), 'two pages of one address'


def test_pages_hold_no_workings(site):
    for n in NOTEBOOKS:
        for c in cells(site / n):
            assert not kind(c, 'export', 'exporti', 'exports', 'default_exp', 'hide'), (
                f'{n}: {source(c)[:80]}'
            )
            for o in c.get('outputs', []):
                shown = json.dumps(o)
                assert o['output_type'] != 'error' and not re.search(
                    r'site-packages/|<stdin>|/ipykernel_|real_accelerator', shown
                ), f'{n}: {source(c)[:80]}'


def exported(
    n: Path,
) -> list:  # names of the functions that a notebook exports, of those that the page should show
    return [
        m
        for c in cells(ROOT / 'nbs' / n)
        if c['cell_type'] == 'code' and kind(c, 'export')
        for m in re.findall(r'^(?:@\w.*\n)*def ([a-z]\w*)\(', source(c), re.M)
        if not re.search(rf'^@patch.*\n(?:@.*\n)*def {m}\(', source(c), re.M)
    ]


def test_functions_are_shown_with_their_parameters(site):
    "Every exported function has its block, and in it each remark that its parameters have."
    total = 0
    for n in NOTEBOOKS:
        page = '\n'.join(
            ''.join(o['data'].get('text/markdown', ''))
            for c in cells(site / n)
            if 'show_doc' in source(c)
            for o in c['outputs']
            if 'data' in o
        )
        for f in exported(n):
            assert re.search(rf'^### {f}$', page, re.M), f'{n} does not show {f}'
            total += 1
    assert total > 500
    page = '\n'.join(
        ''.join(o['data']['text/markdown'])
        for c in cells(site / 'models/11_diffusion.ipynb')
        if 'show_doc' in source(c)
        for o in c['outputs']
    )
    assert (
        'timesteps:Tensor, # [B]' in page and 'like:Tensor, # [B, ...] tensor that they will multiply' in page
    )


def texts(page: Path) -> list[str]:
    "The Markdown of a page: its cells and its outputs."
    found = [source(c) for c in cells(page) if c['cell_type'] == 'markdown']
    return found + [''.join(d['text/markdown']) for d in shown(page) if 'text/markdown' in d]


def shown(page: Path) -> list[dict]:
    return [o['data'] for c in cells(page) for o in c.get('outputs', []) if 'data' in o]


def own_html(data: dict) -> str:
    "The HTML of an output, without the state of widgets and without other pages in it."
    html = ''.join(data.get('text/html', ''))
    return re.sub(r'<script.*?</script>|srcdoc=(["\']).*?\1', '', html, flags=re.S)


def test_links_and_pictures_of_the_pages_are_there(site):
    "On the site, where nothing lies beside the pages: other files of the repository are links to GitHub."
    addresses = {
        str(n.parent / yaml.safe_load(source(cells(site / n)[0]).strip('-\n'))['output-file'])
        for n in NOTEBOOKS
        if 'output-file' in source(cells(site / n)[0])
    }
    addresses.add('draw')  # which .ci/draw.py writes
    for n in NOTEBOOKS:
        text = re.sub(r'```.*?```|`[^`\n]*`', '', '\n'.join(texts(site / n)), flags=re.S)
        for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
            to = ''.join(link).partition('#')[0]
            assert not to.startswith('https://flowerdiff.github.io/flowerdiff/') or to.endswith('/draw/'), to
            if to and not re.match(r'[a-z]+:', to):
                path = os.path.normpath(n.parent / to)
                assert path in addresses or ((site / path).exists() and not path.startswith('..')), (
                    f'{n}: {to}'
                )
                assert path != 'apps/app.ipynb', f'{n}: a link to what is no page'
            if to.startswith('https://github.com/flowerdiff/flowerdiff/blob/main/'):
                assert (ROOT / to.split('/blob/main/')[1]).exists(), f'{n}: {to}'
        assert '[[`' not in text and not re.search(r'\.html#_', text), n


def test_every_picture_has_a_text(site):
    "For those who do not see it: of Markdown, of HTML, and of the outputs of cells."
    total = 0
    for n in NOTEBOOKS:
        for text in texts(site / n):
            assert '![](' not in text, f'{n}: {text[:80]}'
        for data in shown(site / n):
            page = own_html(data)
            for image in re.findall(r'<img\b[^>]*>', page):
                assert re.search(r'\balt=.[^"\']', image), f'{n}: {image[:100]}'
        for c in cells(site / n):
            kinds = [k for o in c.get('outputs', []) for k in o.get('data', {})]
            if not any(k.startswith('image/') for k in kinds):
                continue
            alt = re.match(r'(?:#\|.*\n)*?#\| fig-alt: (.*)', source(c))
            assert alt, f'{n}: {source(c)[:80]}'
            value = yaml.safe_load(alt[1])
            for words in value if isinstance(value, list) else [value]:
                assert len(words) > 15 and not re.search(r'\]\(|`', words), f'{n}: {words}'
                total += 1
    assert total > 200


def test_a_page_has_one_title(site):
    for n in NOTEBOOKS:
        for text in texts(site / n):
            assert not re.search(r'^# ', re.sub(r'```.*?```', '', text, flags=re.S), re.M), (
                f'{n}: {text[:60]}'
            )
        for data in shown(site / n):
            assert '<h1' not in own_html(data), n


def test_pages_ask_no_other_site(site):
    "No script and no style from elsewhere: widgets use the one of this site, formulas need none."
    drawn = 0
    for n in NOTEBOOKS:
        assert 'widgets' not in json.loads((site / n).read_text())['metadata'], n
        views = 0
        for data in shown(site / n):
            assert not any('widget' in kind for kind in data), n
            page = ''.join(data.get('text/html', ''))
            assert not re.search(r'<(script|link|img)[^>]+(src|href)="?(https?:)?//', page), n
            views += page.count('type="application/vnd.jupyter.widget-view+json"')
            if 'vendor/embed.js' in page:
                assert views == 1 and f'"{"../" * (len(n.parts) - 1)}vendor/embed.js"' in page, n
        drawn += views
    assert drawn >= 10
    settings = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    assert settings['format']['html']['html-math-method'] == 'mathml'
    assert settings['project']['resources'] == ['vendor/*']
    for theme in ('theme.scss', 'theme-dark.scss'):
        assert '$web-font-path: false' in (ROOT / 'nbs' / theme).read_text()


def test_stages_and_tutorials_open_in_colab(site):
    "Their pages link to Colab, and there the notebook's second cell installs the library."
    for n in NOTEBOOKS:
        linked = 'colab.research.google.com/github/flowerdiff/flowerdiff/blob/main/nbs/'
        links = [t for t in texts(site / n) if linked in t]
        if n.parts[0] not in ('stages', 'tutorials'):
            assert not links, n
            continue
        assert len(links) == 1 and links[0].startswith(f'[Open in Colab](https://{linked}{n})'), n
        second = source(cells(ROOT / 'nbs' / n)[1])
        assert (
            kind(cells(ROOT / 'nbs' / n)[1], 'hide') and "if 'google.colab' in str(get_ipython())" in second
        ), n


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_dark_pages_can_be_read():
    "WCAG's 4.5 for text: on the page, for code in subtitles on its own ground, and in breadcrumbs."
    dark = (ROOT / 'nbs/theme-dark.scss').read_text()
    colors = dict(re.findall(r'\$([\w-]+): (#[0-9a-f]{6})', dark))
    for name in ('body-color', 'link-color', 'code-color'):
        assert contrast(colors[name], colors['body-bg']) >= 4.5, name
    rules = {
        selector: dict(re.findall(r'([\w-]+): (#[0-9a-f]{6})', body))
        for selector, body in re.findall(r'^([.][^{}]+)\{([^}]*)\}', dark, re.M)
    }
    [code] = [rule for selector, rule in rules.items() if '.description code' in selector]
    assert contrast(code['color'], code['background-color']) >= 4.5
    [crumbs] = [rule for selector, rule in rules.items() if '.breadcrumb-item a' in selector]
    assert all(contrast(crumbs['color'], colors[ground]) >= 4.5 for ground in ('body-bg', 'primary'))


def test_search_for_generator_finds_its_page(site):
    "Quarto ranks titles first: no other page has the word in its title."
    titles = {
        n: yaml.safe_load(source(cells(site / n)[0]).strip('-\n')).get('title', '')
        for n in NOTEBOOKS
        if n.name != 'app.ipynb'
    }
    assert [
        str(n) for n, title in titles.items() if re.search('^generator|generator process', title, re.I)
    ] == ['inference/07_generator.ipynb']


def test_site_files_travel(site):
    "Theme, styles, filter and sidebar are beside the processed pages, where Quarto looks for them."
    big = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    html = big['format']['html']
    wanted = [
        html['css'],
        *big['filters'],
        *(t for ts in html['theme'].values() for t in ts if t.endswith('.scss')),
        '_quarto.yml',
        'sidebar.yml',
        'nbdev.yml',
        big['website']['favicon'],
    ]
    assert not [f for f in wanted if not (site / f).exists()]


def test_quarto_settings_are_quartos():
    "A key that Quarto does not know would be ignored in silence."
    known = dict(
        top='project format filters execute website',
        project='type render resources output-dir',
        execute='enabled',
        html='theme respect-user-color-scheme css toc toc-depth code-copy code-overflow fig-align'
        ' lightbox grid html-math-method',
        website='favicon open-graph twitter-card repo-subdir repo-actions page-navigation'
        ' back-to-top-navigation search navbar sidebar title site-url description repo-branch repo-url',
        navbar='background search left',
    )
    big, small, side = (
        yaml.safe_load((ROOT / f).read_text()) for f in ('_quarto.yml', 'nbs/nbdev.yml', 'nbs/sidebar.yml')
    )
    for name, have in dict(
        top=big,
        project=big['project'] | small['project'],
        execute=big['execute'],
        html=big['format']['html'],
        website=big['website'] | small['website'] | side['website'],
        navbar=big['website']['navbar'],
    ).items():
        assert set(have) <= set(known[name].split()), name
    theme = big['format']['html']['theme']
    assert set(theme) == {'light', 'dark'} and big['website']['search'] and big['execute']['enabled'] is False


# ---- what the pages tell a reader to type

COMMANDS = {
    'flowerdiff',
    'bash',
    'source',
    'export',
    'cp',
    'cd',
    'pip',
    'aws',
    'python',
    'git',
    'mlflow',
    'tensorboard',
    'docker',
    'torchrun',
    'nbdev_export',
    'voila',
    'jupyter',
    'curl',
}


def markdown(path: Path) -> str:
    return (
        path.read_text(encoding='utf-8')
        if path.suffix == '.md'
        else '\n\n'.join(source(c) for c in cells(path) if c['cell_type'] == 'markdown')
    )


def check_command(line: str):
    "Check a line for the shell: our commands must parse, with settings that exist; others name files."
    from flowerdiff.core.profiles import load_profile
    from flowerdiff.pipeline.cli import parser

    words = shlex.split(line, comments=True)
    while words and re.match(r'[A-Z_]+=', words[0]):
        words.pop(0)
    if not words:
        return
    assert words[0] in COMMANDS, line
    if words[0] == 'bash':
        assert (ROOT / words[1]).exists(), line
    if words[0] == 'python' and words[1].endswith('.py'):
        assert (ROOT / words[1]).exists(), line
    if words[0] == 'flowerdiff':
        args = parser().parse_args(words[1:])
        for value in getattr(args, 'set', None) or []:
            key, _, _given = value.partition('=')
            section, _, name = key.partition('.')
            have = load_profile(getattr(args, 'profile', None) or 'garden').model_dump()
            assert (name in have.get(section, {})) if name else key in have, f'{line}: {key} is not a setting'


@pytest.mark.parametrize(
    'path',
    [ROOT / 'README.md', ROOT / 'benchmarks/README.md', *(ROOT / 'nbs' / n for n in NOTEBOOKS)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_what_pages_say_to_type(path):
    text = markdown(path)
    for language, block in re.findall(r'^```([\w{}.-]*)\n(.*?)^```', text, re.M | re.S):
        assert language in ('', 'sh', 'bash', 'python', 'json', 'yaml', 'text'), (
            f'{path.name}: a block of {language}'
        )
        if language in ('sh', 'bash'):
            for line in block.replace('\\\n', ' ').splitlines():
                check_command(line)
        if language == 'json':
            [
                json.loads(line)
                for line in ([block] if block.lstrip().startswith('{\n') else block.splitlines())
                if line.strip()
            ]
        if language == 'yaml':
            yaml.safe_load(block)
        if language == 'python':
            compile(block, path.name, 'exec')
            assert path.name in ('README.md', 'index.ipynb'), (
                'code in markdown is not run: make it a cell'
            )  # README's is run by test_repo
    for said in re.findall(r'`(flowerdiff [a-z]+ [^`]+)`', text):
        if not re.search(r'[A-Z.]{3}|…', said):
            check_command(said)
    from flowerdiff.core.profiles import load_profile
    from flowerdiff.pipeline.cli import parser

    for said in re.findall(r'`flowerdiff ([a-z]+)[^`]*`', text):
        parser().parse_args([said, *(['a rose'] if said == 'generate' else [])])
    have = load_profile('garden').model_dump()
    for section, name in re.findall(r'`([a-z]+)\.([a-z_]+)(?:=[^`]*|: [^`]*)`', text):
        if section in have:
            assert name in have[section], f'{section}.{name} is not a setting'


@pytest.mark.parametrize(
    'line',
    [
        'flowerdiff trian garden',
        'flowerdiff run garden --set train.learning=1',
        'flowerdiff run garden --sett train.lr=1',
        'bash .ci/none',
        'flowrdiff run',
        'flowerdiff run --set trian.lr=1',
    ],
)
def test_a_wrong_line_is_seen(line):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(line)
