"The repository's own rules: what a reader, a reviewer and a release rely on."

import ast
import builtins
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import style
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT / 'flowerdiff').rglob('*.py') if p.name != '_modidx.py')
HEAVY = [
    'torch',
    'diffusers',
    'transformers',
    'accelerate',
    'datasets',
    'torchmetrics',
    'sklearn',
    'mlflow',
    'matplotlib',
    'pandas',
    'papermill',
    'dvc',
    'onnxruntime',
    'boto3',
]


def name(p):
    return str(p.relative_to(ROOT))


ids = dict(ids=name)


def imports(tree: ast.AST) -> set:  # modules of flowerdiff, without the package's name
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            found |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom):
            found |= (
                {f'{n.module}.{a.name}' for a in n.names} | {n.module}
                if not n.level
                else {f'{"." * n.level}{n.module or ""}'}
            )
    return found


def flowerdiff_modules(
    path: Path,
) -> set:  # what a module imports of flowerdiff, anywhere in it: 'config', 'stages.train'
    package = '.'.join(path.relative_to(ROOT).with_suffix('').parts[:-1])
    known = {'.'.join(p.relative_to(ROOT / 'flowerdiff').with_suffix('').parts) for p in MODULES}
    found = set()
    for m in imports(ast.parse(path.read_text(encoding='utf-8'))):
        if m.startswith('.'):
            up = len(m) - len(m.lstrip('.'))
            m = '.'.join(
                [
                    *package.split('.')[: len(package.split('.')) - up + 1],
                    *([m.lstrip('.')] if m.lstrip('.') else []),
                ]
            )
        if m.startswith('flowerdiff.'):
            found.add(m.removeprefix('flowerdiff.'))
    return found & known


def notebook_of() -> dict:  # module -> notebook, by the notebook's default_exp
    pairs = {}
    for p in NOTEBOOKS:
        for c in nbformat.read(p, 4).cells:
            if m := re.search(r'^#\s*\|\s*default_exp\s+(\S+)', c.source, re.M):
                pairs[m[1]] = p
    return pairs


# ---- the code


def test_exported_clean_and_readme(tmp_path):
    "nbdev_clean, nbdev_export and .ci/readme.py would change nothing."
    for part in ('nbs', 'flowerdiff', '.ci'):
        shutil.copytree(
            ROOT / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns('assets', '__pycache__', '.ipynb_checkpoints', 'images'),
        )
    for part in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / part, tmp_path)
    for command in ([BIN / 'nbdev_clean'], [BIN / 'nbdev_export'], [sys.executable, '.ci/readme.py']):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr
    files = {
        p.relative_to(base)
        for base in (ROOT, tmp_path)
        for pattern in ('nbs/**/*.ipynb', 'flowerdiff/**/*.py', 'README.md')
        for p in base.glob(pattern)
        if '.ipynb_checkpoints' not in p.parts
    }

    def text(p):
        return p.read_text() if p.exists() else None

    stale = sorted(str(f) for f in files if text(ROOT / f) != text(tmp_path / f))
    assert not stale, (
        f'run nbdev_clean, nbdev_export and python .ci/readme.py; they would change {", ".join(stale)}'
    )


@pytest.mark.parametrize('path', MODULES, **ids)
def test_module_loads_nothing_unsafe(path):
    tree = ast.parse(path.read_text())
    assert not imports(tree) & {'pickle', 'joblib', 'dill', 'cloudpickle', 'marshal', 'shelve'}, (
        'a pickle can run code'
    )
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        assert ast.unparse(call.func) != 'torch.load', (
            f'{name(path)}: torch.load reads pickles, safetensors does not'
        )
        for k in call.keywords:
            assert (k.arg, getattr(k.value, 'value', None)) not in (
                ('trust_remote_code', True),
                ('allow_pickle', True),
                ('weights_only', False),
                ('shell', True),
            ), ast.unparse(call)


def test_formatted_and_linted():
    "`bash .ci/fix` would change nothing, and no rule of ruff.toml is broken."
    for command in (['format', '--check', '.'], ['check', '.']):
        done = subprocess.run([BIN / 'ruff', *command], cwd=ROOT, capture_output=True, text=True)
        assert not done.returncode, done.stdout[-3000:] + done.stderr


def test_no_name_is_undefined():
    "Exporting moves cells apart. A name whose import stayed behind would only be missed when that line runs."
    command = [BIN / 'ruff', 'check', '--isolated', '--select', 'F821', 'flowerdiff']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout


@pytest.mark.parametrize('row', style.table([]), ids=lambda row: row.name)
def test_reads_well(row):
    "The table of `python tests/style.py`. Rows on prose are printed there, and not enforced."
    if row.passed is False:
        pytest.fail(f'{row.name}: {row.here}, wanted {row.wanted}: {row.places[:20]}')


def test_stages_meet_only_through_files():
    paths = sorted((ROOT / 'flowerdiff/stages').glob('[!_]*.py'))
    assert len(paths) == 10
    for p in paths:
        others = {m for m in flowerdiff_modules(p) if m.startswith('stages.') and m != f'stages.{p.stem}'}
        assert not others, f'{name(p)} imports {others}'


def test_studio_knows_nothing_of_training():
    used = flowerdiff_modules(ROOT / 'flowerdiff/apps/studio.py')
    assert used and not {m for m in used if m.split('.')[0] in ('training', 'data', 'stages', 'pipeline')}


@pytest.mark.parametrize(
    'module',
    [
        'flowerdiff',
        'flowerdiff.pipeline.cli',
        'flowerdiff.pipeline.pipeline',
        'flowerdiff.garden.garden',
        'flowerdiff.evaluation.report',
    ],
)
def test_light_import(module):
    "What the command line needs at start loads no heavy library."
    out = subprocess.check_output(
        [sys.executable, '-c', f'import sys, {module}; print(*sorted(sys.modules))'], text=True, cwd=ROOT
    )
    assert not {m.split('.')[0] for m in out.split()} & set(HEAVY)


# ---- the notebooks


def outputs(nb):
    return [o for c in nb.cells if c.cell_type == 'code' for o in c.outputs]


@pytest.mark.parametrize('path', NOTEBOOKS, **ids)
def test_notebook_is_fit_to_read(path):
    nb = nbformat.read(path, 4)
    assert (
        re.match(r'# .+', nb.cells[0].source) and re.search(r'^> \S', nb.cells[0].source, re.M)
    ) or path.name == 'app.ipynb', 'the first cell is a title and a line that says what for'
    assert (
        path.name == 'app.ipynb' or not re.sub(r'^(# |>).*$', '', nb.cells[0].source, flags=re.M).strip()
    ), 'nbdev leaves out of the page what else stands in the first cell'
    assert not [o for o in outputs(nb) if o.output_type == 'error'], 'a stored traceback'
    size = len(json.dumps(outputs(nb)))
    assert size < 900_000, f'{size / 1e3:.0f} kB of outputs: show smaller or fewer pictures'
    texts = [
        ''.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/plain', ''))) for o in outputs(nb)
    ]
    places = [t for t in texts if re.search(r'(?<![\w/.])/(work|root|home|Users)/\w', t)]
    assert not places, f'a path of the machine that made it: {places[0][:200]}'


def seen_by_reader(cell) -> bool:
    "Is a cell on the page? Hidden cells, imports and private definitions are not."
    if cell.cell_type != 'code':
        return cell.cell_type == 'markdown'
    if re.search(r'^#\s*\|\s*(hide|default_exp)\b', cell.source, re.M) or re.search(
        r'^\s*[!%]', cell.source, re.M
    ):
        return False
    body = ast.parse(cell.source).body
    if re.search(r'^#\s*\|\s*export', cell.source, re.M):
        return any(
            isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') for n in body
        )
    return not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def shows_something(
    cell,
) -> bool:  # a picture, a number that was printed, or one that names where it was measured
    if cell.cell_type == 'markdown':
        return '![' in cell.source or '[measured](' in cell.source
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        page = ''.join(data.get('text/html', ''))
        if any(k.startswith('image/') or k.endswith('widget-view+json') for k in data) or re.search(
            r'<img |<svg|<iframe srcdoc', page
        ):
            return True
        if re.search(
            r'\d',
            ''.join(o.get('text', ''))
            + ''.join(data.get('text/plain', ''))
            + ''.join(data.get('text/markdown', ''))
            + re.sub(r'<[^>]*>', '', page),
        ):
            return True
    return False


@pytest.mark.parametrize(
    'path', [p for p in NOTEBOOKS if p.parent.name in ('core', 'apps') and p.name != 'app.ipynb'], **ids
)
def test_opens_with_something_to_see(path):
    "A chapter opens with what it is for and a picture or a number by the third cell that its reader sees."
    seen = [c for c in nbformat.read(path, 4).cells if seen_by_reader(c)][:3]
    assert any(map(shows_something, seen)), (
        f'{name(path)}: the first three cells on its page show neither a picture nor a number;'
        ' open with what the page makes'
    )


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent.name == 'stages'], **ids)
def test_stage_notebook_runs_the_library(path):
    "One parameters cell for papermill; the last cell calls the exported stage and is not run by the tests."
    nb = nbformat.read(path, 4)
    tagged = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1
    tree = ast.parse(tagged[0].source)
    given = {
        t.id: ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
    }
    assert given == dict(workspace='garden', profile='garden', overrides=[])
    last = [c for c in nb.cells if c.cell_type == 'code'][-1].source
    assert (
        '#| eval: false' in last
        and f'from flowerdiff.stages.{path.stem[3:]} import run' in last
        and 'warn_if_stale' in last
    )


def test_ten_stages_in_order():
    assert [p.stem for p in NOTEBOOKS if p.parent.name == 'stages'] == [
        '01_prepare',
        '02_caption',
        '03_encode',
        '04_upload',
        '05_train',
        '06_promote',
        '07_evaluate',
        '08_onnx',
        '09_tensorrt',
        '10_publish',
    ]


@pytest.mark.parametrize('path', NOTEBOOKS, **ids)
def test_docs_build_can_run_the_imports(path):
    "Building the docs runs exported cells and cells with an import. They may use no name of another cell."
    known, eager = (
        set(dir(builtins)) | {'__name__', '__file__', 'display', 'get_ipython'},
        lambda c: re.search(r'^#\s*\|\s*(export|exporti|exports)\b', c.source, re.M),
    )
    for c in nbformat.read(path, 4).cells:
        if (
            c.cell_type != 'code'
            or re.search(r'^#\s*\|\s*eval:\s*false', c.source, re.M)
            or re.search(r'^\s*[!%]', c.source, re.M)
        ):
            continue
        tree = ast.parse(c.source)
        nodes = list(ast.walk(tree))
        if not eager(c) and not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes):
            continue
        made = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {
            n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
        }
        made |= {
            (a.asname or a.name).split('.')[0]
            for n in nodes
            if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names
        } | {a.arg for n in nodes if isinstance(n, ast.arg) for a in [n]}
        made |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
        starred = any(
            isinstance(n, ast.ImportFrom) and a.name == '*' for n in nodes for a in getattr(n, 'names', [])
        )
        known |= made | (set(vars(importlib.import_module('fastcore.test'))) if starred else set())
        if eager(c):
            continue  # names inside functions may come later
        lacking = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - known
        assert not lacking, (
            f'{name(path)} {c.id}: {sorted(lacking)} come from a cell that is not run then;'
            ' put the imports in a cell of their own'
        )


# ---- the site and the front page


def pages(items):
    for it in items:
        if isinstance(it, str):
            yield it
        else:
            yield from pages(it['contents'])


def test_sidebar_has_every_notebook():
    listed = list(
        pages(yaml.safe_load((ROOT / 'nbs/sidebar.yml').read_text())['website']['sidebar']['contents'])
    )
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(p.relative_to(ROOT / 'nbs')) for p in NOTEBOOKS} - {'apps/app.ipynb'}


def test_notebooks_leave_nothing_behind():
    "Find a folder or a file that a notebook has made, after all of them have run."
    site, left = (
        {
            '_quarto.yml',
            'nbdev.yml',
            'sidebar.yml',
            'quiet.lua',
            'styles.css',
            'theme.scss',
            'theme-dark.scss',
        },
        [],
    )
    for p in (ROOT / 'nbs').rglob('*'):
        if p.is_dir() or p.suffix == '.ipynb' or '.ipynb_checkpoints' in p.parts:
            continue
        if p.relative_to(ROOT / 'nbs').parts[0] != 'images' and name(p) not in {f'nbs/{f}' for f in site}:
            left.append(name(p))
    assert not left


def test_site_settings_meet():
    "nbs/_quarto.yml only points to the root's; what that names is there."
    small = yaml.safe_load((ROOT / 'nbs/_quarto.yml').read_text())
    assert set(small) == {'project', 'metadata-files'}
    assert all((ROOT / 'nbs' / f).exists() for f in small['metadata-files'])
    big = yaml.safe_load((ROOT / '_quarto.yml').read_text())
    html = big['format']['html']
    files = [
        html['css'],
        *big['filters'],
        big['website']['favicon'],
        *(t for ts in html['theme'].values() for t in ts if t.endswith('.scss')),
        *(i['href'] for i in big['website']['navbar']['left']),
    ]
    assert not [f for f in files if not (ROOT / 'nbs' / f).exists()]


def test_sidebar_is_a_path():
    "Front page, tutorials, the stages in their order, then one section for each folder, by number."
    side = yaml.safe_load((ROOT / 'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    sections = [part['contents'] for part in side[1:]]
    folders = [{page.split('/')[0] for page in section} for section in sections]
    assert side[0] == 'index.ipynb'
    assert all(section == sorted(section) for section in sections)
    assert [len(names) for names in folders] == [1] * len(folders), 'a section is one folder'
    order = [names.pop() for names in folders]
    levels = [style.LEVEL[name] for name in order[2:]]
    assert order[:2] == ['tutorials', 'stages'] and levels == sorted(levels)


def links(text: str) -> set:  # (file, heading) of each relative link and image; '' is this page
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    found = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text)
    return {(a or b).partition('#')[::2] for a, b in found if not re.match(r'[a-z]+:', a or b)}


def headings(path: Path) -> set:  # their ids, as pandoc and GitHub make them
    text = re.sub(r'```.*?```', '', markdown(path), flags=re.S)

    def plain(h):
        return re.sub(r'\[([^]]*)\]\([^)]*\)|[`*]', r'\1', h).strip().lower()

    return {
        re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', plain(h))) for h in re.findall(r'^#+ (.+)$', text, re.M)
    }


def broken(path: Path, text: str) -> list:  # links of a page that lead nowhere
    out = []
    for file, heading in links(text):
        to = path.parent / file if file else path
        if not to.exists():
            out.append(file)
        elif heading and heading not in headings(to):
            out.append(f'{file}#{heading}')
    return out


@pytest.mark.parametrize(
    'path', [ROOT / 'README.md', ROOT / 'benchmarks/README.md', ROOT / 'CHANGELOG.md', *NOTEBOOKS], **ids
)
def test_links_lead_somewhere(path):
    assert not broken(path, markdown(path))


@pytest.mark.parametrize('page', ['11_settings', '12_api'])
def test_reference_is_up_to_date(page, monkeypatch):
    "The stored tables of the settings reference and the API index are what their cells make today."
    path = ROOT / f'nbs/tutorials/{page}.ipynb'
    monkeypatch.chdir(path.parent)
    names = {}
    stale = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != 'code' or 'google.colab' in cell.source:
            continue
        *body, last = ast.parse(cell.source).body
        exec(compile(ast.Module(body, []), page, 'exec'), names)
        if not cell.outputs:
            exec(compile(ast.Module([last], []), page, 'exec'), names)
            continue
        made = eval(compile(ast.Expression(last.value), page, 'eval'), names)
        if made.data != ''.join(cell.outputs[0].data['text/markdown']):
            stale.append(cell.id)
    assert not stale, f'{page}: run the cells {stale} again'


def test_broken_links_are_seen():
    path = ROOT / 'nbs/tutorials/06_change.ipynb'
    good = (
        '[a](10_benchmarks.ipynb#what-each-choice-buys) ![b](../images/drawn.png) [c](#a-sweep)'
        ' [d](https://example.org/none) `[e](none.md)` <img src="../images/banner.png">'
    )
    assert not broken(path, good)
    for bad in (
        '[a](12_none.ipynb)',
        '![a](../images/none.png)',
        '[a](10_benchmarks.ipynb#none)',
        '[a](#none)',
        '<img src="none.png">',
        '[a](../../benchmarks/none.py)',
    ):
        assert len(broken(path, good + bad)) == 1, bad


def test_readme_commands_are_there():
    commands = re.findall(r'^bash (\S+)', (ROOT / 'README.md').read_text(), re.M)
    assert commands == ['.ci/garden', '.ci/test', '.ci/fix']
    for c in [*commands, '.ci/run', '.ci/setup']:
        subprocess.run(['bash', '-n', c], cwd=ROOT, check=True)


def markdown(path: Path) -> str:
    return (
        path.read_text(encoding='utf-8')
        if path.suffix == '.md'
        else '\n\n'.join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    )


def test_readme_python_example(tiny_workspace, tmp_path):
    "The example of the front page, with the miniature garden in place of a real one."
    from PIL import Image

    (tmp_path / 'garden').symlink_to(tiny_workspace)
    code = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert len(code) == 1
    subprocess.run([sys.executable, '-c', code[0]], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / 'tulips.png').size == (64, 64)


def test_benchmarks_are_described():
    "Each script of benchmarks/ has its section in benchmarks/README.md, and the other way round."
    scripts = {p.name for p in (ROOT / 'benchmarks').glob('*.py')}
    assert scripts and scripts == set(
        re.findall(r'\b(?!test_)\w+\.py', (ROOT / 'benchmarks/README.md').read_text())
    )


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks').glob('*.py')), **ids)
def test_benchmarks_use_what_exists(path):
    "Each name that a script takes from the library is still there. Running a benchmark takes minutes."
    tree = ast.parse(path.read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith('flowerdiff'):
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f'{node.module}.{name}')
                found[name] = getattr(module, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = found.get(node.value.id)
            if isinstance(owner, (type, ModuleType)):
                assert hasattr(owner, node.attr), f'line {node.lineno}: {node.value.id}.{node.attr}'


# ---- workflows and packaging

WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


@pytest.mark.parametrize('path', WORKFLOWS, **ids)
def test_workflow_actions_are_pinned(path):
    used = re.findall(r'uses:\s*(.+)', path.read_text())
    assert used and all(re.fullmatch(r'[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*', u) for u in used), used


def test_workflows_are_safe_and_valid():
    env = {k: v for k, v in os.environ.items() if k not in ('GH_TOKEN', 'GITHUB_TOKEN')}
    for command in (
        [BIN / 'zizmor', '--offline', '--persona', 'pedantic', '--no-progress', '.github/workflows'],
        [BIN / 'check-jsonschema', '--builtin-schema', 'vendor.github-workflows', *map(str, WORKFLOWS)],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
        assert not done.returncode, done.stdout + done.stderr


def test_workflows_install_what_was_tested():
    "By .ci/setup alone, on the Pythons that it accepts; the Space is written when something of it changed."
    flows = {path.stem: yaml.safe_load(path.read_text()) for path in WORKFLOWS}
    docs = [step.get('run', '') for step in flows['docs']['jobs']['build']['steps']]
    assert 'bash .ci/docs' in docs and not any('pip install' in run for run in docs)
    builds = (ROOT / '.ci/docs').read_text()
    assert '/setup"' in builds and 'nbdev_' not in builds, 'nbdev_docs would write README.md anew'
    tested = flows['test']['jobs']['test']['strategy']['matrix']['python']
    low, high = re.search(
        r'\((\d, \d+)\) <= sys.version_info\[:2\] <= \((\d, \d+)\)', (ROOT / '.ci/setup').read_text()
    ).groups()
    assert [tested[0], tested[-1]] == [low.replace(', ', '.'), high.replace(', ', '.')]
    assert all(any(ROOT.glob(path)) for path in flows['space'][True]['push']['paths'])


def test_every_dependency_is_pinned():
    from configparser import ConfigParser

    config = ConfigParser()
    config.read(ROOT / 'settings.ini', encoding='utf-8')

    def norm(s):
        return re.split(r'[<>=\[;]', s)[0].lower().replace('_', '-')

    pinned = {norm(line) for line in (ROOT / 'constraints.txt').read_text().splitlines() if '==' in line}
    wanted = {
        norm(r)
        for k in ('requirements', 'dev_requirements', 'sagemaker_requirements', 'deepspeed_requirements')
        for r in config['DEFAULT'][k].split()
    }
    assert not wanted - pinned


def test_each_pin_installs_on_the_first_release_of_its_python():
    "Fails with soupsieve 4.1.1, which needs Python 3.11.5: Debian 12 has 3.11.2."
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.specifiers import SpecifierSet

    first = f'{sys.version_info.major}.{sys.version_info.minor}.0'
    refused = []
    checked = 0
    for line in (ROOT / 'constraints.txt').read_text().splitlines():
        name = re.match(r'[\w.-]+(?===)', line)
        try:
            wanted = name and metadata(name.group())['Requires-Python']
        except PackageNotFoundError:
            continue
        checked += bool(wanted)
        if wanted and first not in SpecifierSet(wanted):
            refused.append(f'{line}: {wanted}')
    assert checked > 200 and not refused
