"""How the code reads, in numbers: `python tests/style.py [FOLDER ...]`
prints a table, and fails past its limits.

Counted are the exported modules, and with them the shown cells of the notebooks. `-v` names each place.
The rows on prose are printed and never enforced: what counts is that a page reads well.
"""

import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = [
    {'core', 'garden'},
    {'services'},
    {'drawing'},
    {'models'},
    {'data', 'inference'},
    {'training', 'evaluation'},
    {'cloud', 'apps'},
    {'stages'},
    {'selftest'},
    {'pipeline'},
]  # a folder imports from the groups to its left, and from modules with lower numbers of its own
LEVEL = {folder: i for i, group in enumerate(FOLDERS) for folder in group}
MAX_LINE = 110
MAX_FUNCTION = 40
MAX_MODULE = 400
MAX_POSITIONAL = 5
MAX_MODULES = 20

# Words that the project once invented, where the field has its own. Left: a pattern. Right: the field's word.
TERMS = {
    r'wish(es)?': 'generation request',
    r'painters?|remotepainter': 'generation session',
    r'easels?|dials?': 'controls',
    r'\bdesk\b': 'request queue',
    r'\bkeeper\b': 'worker supervisor',
    r'rehears\w+': 'warm-up',
    r'lookers?\b': 'validation callback',
    r'apprentices?': 'distillation setup',
    r'bringers?': 'shard fetcher',
    r'luck(y|ily)?': 'p_value, rng',
    r'crown(s|ed|ing)?\b': 'promote',
    r'graduat(e|es|ed|ion)\b': 'promote_student',
    r'\bexams?\b|\bexamin\w+': 'student evaluation',
    r'\bladders?\b|\brungs?\b': 'timesteps, index',
    r'step(s|ping)?[ _]down': 'DDIM step',
    r'(?<!\.)strips?(?![(_])': 'image rows',
    r'\bcrowds?\b': 'distributions',
    r'\bjudges?\b|\bjudged\b': 'attribute classifier',
    r'\beyes\b': 'perceptual network',
    r'dealt out': 'sharded',
    r'\bsow(n|s|ing)?\b': 'generate',
    r'lay(s|ing)? out\b|lay_out|laid out': 'prepare',
    r'\btake(s|n)?_in\b': 'import results',
    r'whoever|whomever|somebody|everybody': 'you, users',
    r'the house\b|at home\b': 'this machine',
    r'is to be had|are to be had|to be had\b': 'is available',
    r"somebody's|nobody's": "another user's",
}
ALLOWED = {'eyes': ('celeba', 'test_datasets')}  # a word that is meant as it is in files with this name
TICS = re.compile(r'\b(whoever|somebody|nobody|told|beside)\b', re.I)


def modules() -> dict[str, Path]:
    "Dotted name without the package -> file of each exported module."
    files = (p for p in (ROOT / 'flowerdiff').rglob('*.py') if p.name not in ('_modidx.py', '__init__.py'))
    return {'.'.join(p.relative_to(ROOT / 'flowerdiff').with_suffix('').parts): p for p in sorted(files)}


def notebooks() -> list[Path]:
    return sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def source(cell) -> str:
    return ''.join(cell['source'])


def read_cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def notebook_of() -> dict[str, Path]:
    "Exported module -> its notebook."
    found = {}
    for path in notebooks():
        for cell in read_cells(path):
            match = re.search(r'^#\s*\|\s*default_exp\s+(\S+)', source(cell), re.M)
            if match:
                found[match[1]] = path
    return found


# ---- imports


def imported(path: Path, name: str, known: set[str]) -> set[str]:
    "Modules of the package that a module imports, lazy imports included."
    package = f'flowerdiff.{name}'.split('.')[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = '.'.join([*base, *([node.module] if node.module else [])])
            found |= {full, *(f'{full}.{alias.name}' for alias in node.names)}
    return {m.removeprefix('flowerdiff.') for m in found} & known - {name}


def import_graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imported(path, name, set(files)) for name, path in files.items()}


def import_circles(graph: dict[str, set[str]]) -> list[str]:
    "A circle as text, if there is one."
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [' -> '.join(error.args[1])]
    return []


def wrong_way(graph: dict[str, set[str]]) -> list[str]:
    "Imports against the order of the folders, or of the numbers in a folder."
    number = {name: int(path.name[:2]) for name, path in notebook_of().items()}
    bad = []
    for name, used in graph.items():
        folder = name.split('.')[0]
        for other in used:
            to = other.split('.')[0]
            if to == folder:
                wrong = number[other] >= number[name]
            else:
                demo = name == 'core.workspace' and to == 'stages'  # demo_workspace runs the stages
                wrong = LEVEL[to] >= LEVEL[folder] and not demo
            if wrong:
                bad.append(f'{name} -> {other}')
    return bad


# ---- code


def is_packed(node: ast.AST) -> bool:
    "`a, b = f(x), g(y)`: two assignments in one. A swap is not; neither is an unpacked call."
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    if not isinstance(node.targets[0], ast.Tuple):
        return False
    targets = {ast.unparse(e) for e in node.targets[0].elts}
    values = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    constants = all(isinstance(e, ast.Constant) for e in node.value.elts)
    return not targets & values and not constants


def buried_walrus(tree: ast.AST) -> list[ast.AST]:
    "Walruses that are not the whole test of an `if`, `while` or comprehension."
    plain = set()
    for node in ast.walk(tree):
        tests = [node.test] if isinstance(node, ast.If | ast.While) else getattr(node, 'ifs', [])
        for test in tests:
            test = test.operand if isinstance(test, ast.UnaryOp) else test
            test = test.left if isinstance(test, ast.Compare) else test
            plain.add(id(test))
    return [n for n in ast.walk(tree) if isinstance(n, ast.NamedExpr) and id(n) not in plain]


def functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def positional(node: ast.FunctionDef) -> int:
    names = [a.arg for a in [*node.args.posonlyargs, *node.args.args]]
    return len(names) - (names[:1] in (['self'], ['cls']))


def semicolons(text: str) -> int:
    "Semicolons outside of strings and comments."
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(t.type == tokenize.OP and t.string == ';' for t in tokens)


@dataclass
class Code:
    "What was counted in exported modules and shown cells."

    lengths: list[int] = field(default_factory=list)
    bodies: list[int] = field(default_factory=list)  # lines of each function
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, text: str, where: str, exported: bool = True):
        lines = [line for line in text.splitlines() if line.strip()]
        self.lengths += [len(line) for line in lines]
        for i, line in enumerate(text.splitlines(), 1):
            if len(line) > MAX_LINE and not line.startswith('# %%') and 'AUTOGENERATED' not in line:
                self.places['wide'].append(f'{where}:{i}')
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a cell with a magic
            return
        self.places['semicolons'] += [where] * semicolons(text)
        for node in ast.walk(tree):
            if is_packed(node):
                self.places['packed'].append(f'{where}:{node.lineno}')
        self.places['walrus'] += [f'{where}:{n.lineno}' for n in buried_walrus(tree)]
        for f in functions(tree):
            size = f.end_lineno - f.lineno + 1
            if exported:
                self.bodies.append(size)
            if size > MAX_FUNCTION:
                self.places['long functions'].append(f'{where}:{f.lineno} {f.name} ({size})')
            if positional(f) > MAX_POSITIONAL:
                self.places['parameters'].append(f'{where}:{f.lineno} {f.name} ({positional(f)})')


def is_shown(cell) -> bool:
    text = source(cell)
    return cell['cell_type'] == 'code' and not re.search(r'^#\s*\|\s*(export|default_exp|hide)', text, re.M)


def count_code(folders: list[str]) -> Code:
    code = Code()
    for name, path in modules().items():
        if name.split('.')[0] in folders or not folders:
            text = re.sub(r'\A.*?(?=^# %% \.\.)', '', path.read_text(encoding='utf-8'), flags=re.S | re.M)
            text = '\n'.join(line for line in text.splitlines() if not line.startswith('# %%'))
            code.add(text, name)
            if len(text.splitlines()) > MAX_MODULE:
                code.places['long modules'].append(f'{name} ({len(text.splitlines())})')
    for path in notebooks():
        if path.parent.name in folders or not folders:
            for cell in read_cells(path):
                if is_shown(cell):
                    code.add(source(cell), f'{path.relative_to(ROOT)} {cell["id"]}', exported=False)
    return code


# ---- words


def texts_of(path: Path) -> list[tuple[str, str]]:
    "(where, text) of everything that a reader meets in a file."
    if path.suffix == '.ipynb':
        return [(f'{path.relative_to(ROOT)} {c["id"]}', source(c)) for c in read_cells(path)]
    return [(str(path.relative_to(ROOT)), path.read_text(encoding='utf-8'))]


def invented_terms(folders: list[str]) -> list[str]:
    pattern = re.compile('|'.join(f'(?<![A-Za-z])(?:{p})(?![a-z])' for p in TERMS), re.I)
    files = [p for p in notebooks() if p.parent.name in folders or not folders]
    if not folders:
        files += [p for d in ('tests', 'benchmarks') for p in sorted((ROOT / d).glob('*.py'))]
        files += [*sorted((ROOT / 'flowerdiff/profiles').glob('*.yaml')), ROOT / 'README.md']
    found = []
    for path in files:
        if path == Path(__file__):
            continue
        for where, text in texts_of(path):
            words = [m[0] for m in pattern.finditer(text)]
            found += [
                f'{where} {word}'
                for word in words
                if not any(part in path.name for part in ALLOWED.get(word.lower(), ()))
            ]
    return found


@dataclass
class Prose:
    words: int = 0
    you: int = 0
    semicolons: int = 0
    tics: int = 0

    def per_10k(self, count: int) -> str:
        return f'{1e4 * count / max(1, self.words):.0f}'


def count_prose(folders: list[str]) -> Prose:
    prose = Prose()
    for path in notebooks():
        if folders and path.parent.name not in folders:
            continue
        for cell in read_cells(path):
            if cell['cell_type'] == 'markdown':
                text = re.sub(r'```.*?```|`[^`]*`|\$[^$]*\$', '', source(cell), flags=re.S)
                prose.words += len(re.findall(r'\w+', text))
                prose.you += len(re.findall(r'\byou\b|\byour\b', text, re.I))
                prose.semicolons += text.count(';')
                prose.tics += len(TICS.findall(text))
    return prose


# ---- what a notebook shows


def has_picture(cells) -> bool:
    for cell in cells:
        if re.search(r'!\[[^]]*\]\([^)]+\.(png|jpg|jpeg|gif)\)|<img ', source(cell)):
            return True
        for output in cell.get('outputs', []):
            data = output.get('data', {})
            if any(k.startswith('image/') or k.endswith('widget-view+json') for k in data):
                return True
            if re.search(r'<img |<svg|<iframe', ''.join(data.get('text/html', ''))):
                return True
    return False


PICTURED = {'stages', 'models', 'training', 'inference', 'evaluation'}


def pictures_missing(folders: list[str]) -> tuple[list[str], int, int]:
    "(notebooks that must have a picture and have none, with a picture, all)"
    missing, having, total = [], 0, 0
    for path in notebooks():
        if (folders and path.parent.name not in folders) or path.name == 'app.ipynb':
            continue
        found = has_picture(read_cells(path))
        total += 1
        having += found
        if not found and path.parent.name in PICTURED:
            missing.append(str(path.relative_to(ROOT)))
    return missing, having, total


def is_export(cell) -> bool:
    return bool(re.match(r'#\s*\|\s*export', source(cell)))


def defines(cell) -> bool:
    if cell['cell_type'] != 'code' or not is_export(cell):
        return False
    return any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.parse(source(cell)).body)


def shown_definitions(folders: list[str]) -> tuple[int, list[str]]:
    "(cells with definitions, those that no cell with code or a result follows)"
    total, unshown = 0, []
    for path in notebooks():
        if folders and path.parent.name not in folders:
            continue
        code = [c for c in read_cells(path) if c['cell_type'] == 'code' and source(c).strip()]
        for cell, following in zip(code, [*code[1:], None]):
            if defines(cell):
                total += 1
                if following is None or is_export(following):
                    unshown.append(f'{path.relative_to(ROOT)} {cell["id"]}')
    return total, unshown


# ---- the table


@dataclass
class Row:
    name: str
    here: str
    wanted: str
    passed: bool | None = None  # None: printed only
    places: list[str] = field(default_factory=list)


def code_rows(folders: list[str]) -> list[Row]:
    code = count_code(folders)
    lines = len(code.lengths)
    p90 = sorted(code.lengths)[int(0.9 * lines)]
    at = code.places
    packed, walrus = (1e3 * len(at[k]) / lines for k in ('packed', 'walrus'))
    median = statistics.median(code.bodies)
    per_folder = Counter(name.split('.')[0] for name in modules())
    crowded = [f'{k}: {n}' for k, n in per_folder.items() if n > MAX_MODULES]
    return [
        Row('line length, 90th percentile', f'{p90}', '<= 95', p90 <= 95),
        Row(f'lines over {MAX_LINE} columns', f'{len(at["wide"])}', '0', not at['wide'], at['wide']),
        Row('`;`', f'{len(at["semicolons"])}', '0', not at['semicolons'], at['semicolons']),
        Row('packed assignments a thousand lines', f'{packed:.1f}', '<= 10', packed <= 10, at['packed']),
        Row('buried walruses a thousand lines', f'{walrus:.1f}', '<= 2', walrus <= 2, at['walrus']),
        Row(
            f'functions with over {MAX_POSITIONAL} positional parameters',
            f'{len(at["parameters"])}',
            '0',
            not at['parameters'],
            at['parameters'],
        ),
        Row(
            f'functions over {MAX_FUNCTION} lines',
            f'{len(at["long functions"])}',
            '0',
            not at['long functions'],
            at['long functions'],
        ),
        Row('lines of a function, median', f'{median:.0f}', '<= 15', median <= 15),
        Row(
            f'modules over {MAX_MODULE} lines',
            f'{len(at["long modules"])}',
            '0',
            not at['long modules'],
            at['long modules'],
        ),
        Row(f'folders with over {MAX_MODULES} modules', f'{len(crowded)}', '0', not crowded, crowded),
    ]


def structure_rows() -> list[Row]:
    graph = import_graph()
    circles = import_circles(graph)
    against = wrong_way(graph)
    return [
        Row('import circles', f'{len(circles)}', '0', not circles, circles),
        Row('imports against the order', f'{len(against)}', '0', not against, against),
    ]


def reading_rows(folders: list[str]) -> list[Row]:
    terms = invented_terms(folders)
    prose = count_prose(folders)
    missing, having, total = pictures_missing(folders)
    definitions, unshown = shown_definitions(folders)
    shown = 1 - len(unshown) / max(1, definitions)
    return [
        Row('invented terms', f'{len(terms)}', '0', not terms, terms),
        Row('notebooks that want a picture and have none', f'{len(missing)}', '0', not missing, missing),
        Row('notebooks with a picture', f'{having} of {total}', '>= 75 %', having >= 0.75 * total or None),
        Row('definitions that are shown', f'{shown:.0%}', '>= 80 %', shown >= 0.8, unshown),
        Row('"you" per 10,000 words', prose.per_10k(prose.you), '>= 100'),
        Row('semicolons per 10,000 words', prose.per_10k(prose.semicolons), '<= 20'),
        Row('"whoever, somebody, nobody, told, beside"', prose.per_10k(prose.tics), '<= 3'),
    ]


def table(folders: list[str]) -> list[Row]:
    return [*code_rows(folders), *(structure_rows() if not folders else []), *reading_rows(folders)]


def main(args: list[str]) -> int:
    rows = table([a for a in args if not a.startswith('-')])
    width = max(len(row.name) for row in rows)
    for row in rows:
        mark = ' ' if row.passed is None else '✓' if row.passed else '✗'
        print(f'{mark} {row.name:<{width}}  {row.here:>12}   {row.wanted}')
        if '-v' in args and not row.passed:
            print(*(f'      {place}' for place in row.places), sep='\n')
    return int(any(row.passed is False for row in rows))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
