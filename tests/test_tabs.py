"""The studio's controls and tabs in a real browser, with a tiny random model and a miniature garden.

FLOWERDIFF_TEST_GARDEN=WORKSPACE shows a trained garden instead (one that may be written to);
FLOWERDIFF_TEST_SHOTS=FOLDER keeps screenshots of every tab."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import (
    ENV,
    GARDEN,
    browser_fixture,  # noqa: F401
    browser_only,
    draw,
    fill,
    open_page,
    picture,
    press,
    says,
    served,
    shot,
    visitor,
)
from PIL import Image

TABS = {
    'Studio': '.fd-request .fd-chips',
    'Compare': '.fd-generate:text("Generate both")',
    'Grid': '.fd-generate:text("Generate grid")',
    'Interpolate': '.fd-generate:text("Generate frames")',
    'Blind test': '.fd-votes',
    'Explore': '.fd-explore .fd-card',
}  # what only that tab has


@pytest.fixture(scope='module')
def workspace(request, tmp_path_factory):
    if GARDEN:
        return Path(GARDEN)
    copy = tmp_path_factory.mktemp('tabs') / 'garden'
    shutil.copytree(request.getfixturevalue('tiny_workspace'), copy, symlinks=True)
    return copy


@pytest.fixture(scope='module')
def url(workspace):
    with served(workspace) as (_, url):
        yield url


@pytest.fixture(scope='module')
def page(browser, url):
    return visitor(browser, url)


def tab(page, name):
    page.locator('.fd-tabs').get_by_role('tab', name=name, exact=True).click()
    page.locator(TABS[name]).first.wait_for()


def pick(page, name):
    page.locator('.fd-controls .fd-options').get_by_role('button', name=name, exact=True).click()


def own(workspace, **how):  # what a Generator draws
    out = workspace / 'work' / 'own.png'
    backend = how.pop('backend', 'torch')
    code = (
        f'from flowerdiff import Generator; Generator.from_pretrained({str(workspace)!r}, {backend!r})('
        f"'a rose', **{how!r})[0].save({str(out)!r})"
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=ENV)
    return Image.open(out).copy()


def far(a, b):
    return np.abs(
        np.asarray(a.convert('RGB'), dtype=float) - np.asarray(b.convert('RGB').resize(a.size), dtype=float)
    ).mean()


@browser_only
def test_backend_and_sampler(page, workspace):
    "Breaks when the scheduler is lost, another backend is opened, or the page offers what cannot run."
    tab(page, 'Studio')
    trt = page.locator('.fd-controls').get_by_role('button', name='TensorRT', exact=True)
    if not Path('/dev/nvidia0').exists():
        assert trt.is_disabled() and 'TensorRT: no NVIDIA GPU' in page.locator('.fd-reasons').inner_text()
    pick(page, 'ONNX Runtime')
    page.get_by_label('Scheduler', exact=True).select_option(label='Euler')
    drawn = draw(page, 'a rose', 5)
    line = page.locator('.fd-card small').first.inner_text()
    assert 'Euler' in line and 'ONNX Runtime' in line and not page.locator('.fd-card .fd-warning').count()
    how = dict(seed=5, num_inference_steps=20, guidance_scale=4.0)
    right, wrong = (
        own(workspace, backend='onnx', scheduler='euler', **how),
        own(workspace, backend='onnx', **how),
    )
    assert far(right, drawn) < 0.02 and far(wrong, drawn) > 10 * far(right, drawn) + 0.5
    pick(page, 'PyTorch')
    page.get_by_label('Scheduler', exact=True).select_option(index=0)
    shot(page, 'studio')


@browser_only
def test_row_of_denoising_previews(page):
    "Breaks when steps are kept from the wrong end, or not as many as asked."
    tab(page, 'Studio')
    drawn = draw(page, 'a rose', 5)
    steps = [picture(i) for i in page.locator('.fd-card').first.locator('.fd-denoising img').all()]
    assert len(steps) == 6
    errors = [far(s, drawn) for s in steps]
    assert errors[-1] < errors[0] and far(steps[0], steps[-1]) > 1, errors


@browser_only
def test_two_settings_side_by_side(page):
    "Breaks when both sides take the left controls, or seeds differ."
    tab(page, 'Compare')
    fill(page, 'Prompt', 'a rose')
    fill(page, 'Seed', 3)
    page.get_by_role('button', name='Generate both').click()
    page.locator('.fd-pair .fd-card').nth(1).wait_for()
    said = page.locator('.fd-pair small').all_inner_texts()
    assert (
        said[0].startswith('seed 3 · 20 steps')
        and said[1].startswith('seed 3 · 10 steps')
        and 'steps 20 and 10' in page.locator('.fd-pair').inner_text()
    )
    srcs = [i.get_attribute('src') for i in page.locator('.fd-pair .fd-image img').all()]
    assert len(srcs) == 2 and srcs[0] != srcs[1]
    shot(page, 'compare')
    # `_reuse` that gives both sides the left controls, or leaves the words
    fill(page, 'Prompt', 'a white daisy')
    fill(page, 'Seed', 4)
    steps = page.locator('.fd-three .fd-panel').nth(2).locator('.widget-readout').first
    page.locator('.fd-three .fd-panel').nth(2).get_by_role('slider').first.focus()
    page.keyboard.press('End')
    steps.get_by_text('60', exact=True).wait_for()
    page.get_by_role('button', name='Use again').click()
    says(page.locator('.fd-prompt textarea'), 'a rose')
    says(page.get_by_label('Seed', exact=True), 3)
    steps.get_by_text('10', exact=True).wait_for()
    assert page.locator('.fd-three .fd-panel').nth(1).locator('.widget-readout').first.inner_text() == '20'


@browser_only
def test_blind_test_keeps_its_tally(page, workspace):
    "Breaks when names show before the choice, the choice is written for the wrong side, or counts twice."
    tab(page, 'Blind test')
    page.get_by_role('button', name='Next pair').click()
    page.wait_for_function(
        "[...document.querySelectorAll('button')].some(b => b.innerText == 'Left is better' && !b.disabled)"
    )
    shown = page.locator('.fd-right').inner_text()
    assert 'Champion' not in shown and 'steps' not in shown
    shot(page, 'blind')
    file = workspace / 'work' / 'blind.jsonl'
    before = len(file.read_text().splitlines()) if file.exists() else 0
    press(page.get_by_role('button', name='Right is better'))
    page.locator('.fd-right').get_by_text('★').wait_for()
    page.locator('.fd-result').get_by_text('was better in').wait_for()
    last = json.loads(file.read_text().splitlines()[-1])
    assert (
        len(file.read_text().splitlines()) == before + 1
        and last['chosen'] == last['right']
        and {last['left'], last['right']} == {'Champion', 'Champion, 5 steps'}
    )
    assert page.locator('.fd-card figcaption').nth(1).inner_text().startswith('★ ' + last['right'])
    assert re.search(r'was better in \d of \d.*95% confidence', page.locator('.fd-result').inner_text())
    page.wait_for_function(
        "[...document.querySelectorAll('button')].some(b => b.innerText == 'Right is better' && b.disabled)"
    )
    shot(page, 'blind-chosen')


@browser_only
def test_explore_the_run(page, workspace):
    "Breaks when captions stand at the wrong pictures, the curve is lost, or the search finds everything."
    tab(page, 'Explore')
    rows = [json.loads(line) for line in (workspace / 'captions' / 'metadata.jsonl').read_text().splitlines()]
    first = page.locator('.fd-explore .fd-card').first
    assert (
        rows[0]['captions'][0] in first.inner_text()
        and rows[0]['file_name'] in first.inner_text()
        and first.locator('img').evaluate('e => e.decode().then(() => e.naturalWidth)') > 0
    )
    page.locator('svg.chart polyline').nth(1).wait_for(state='attached')
    assert (
        page.locator('svg.chart polyline').count() == 2
        and 'validation loss' in page.locator('.fd-halves').inner_text()
    )
    assert page.locator('.fd-grid').evaluate('e => e.decode().then(() => e.naturalWidth)') > 0
    shot(page, 'explore')
    page.get_by_role('button', name='Next', exact=True).click()
    page.get_by_text('13 to').wait_for()
    page.get_by_label('Find', exact=True).fill('rose')
    page.keyboard.press('Enter')
    lines = (workspace / 'captions' / 'metadata.jsonl').read_text().splitlines()
    n = sum('rose' in line.lower() for line in lines)
    page.get_by_text(f'of {n:,}').wait_for()
    page.get_by_role('button', name='Show the report').click()
    page.frame_locator('.fd-report').locator('h1').first.wait_for()


@browser_only
def test_keys_alone(page):
    "Breaks when a tab or Draw is no button, or cannot be reached with Tab."
    tab(page, 'Studio')
    page.get_by_role('button', name='Generate', exact=True).wait_for()
    page.locator('.fd-tabs button').first.focus()
    reached = []
    for _ in range(20):
        page.keyboard.press('Tab')
        reached.append(page.evaluate('document.activeElement.innerText || document.activeElement.tagName'))
        if reached[-1] == 'Generate':
            break
    assert reached[-1] == 'Generate' and reached[:5] == [*TABS][1:], reached
    page.locator('.fd-tabs button').nth(1).focus()
    page.keyboard.press('Space')
    page.get_by_role('button', name='Generate both').wait_for()
    page.locator('.fd-tabs button').first.focus()
    page.keyboard.press('Enter')
    page.get_by_role('button', name='Generate', exact=True).wait_for()


@browser_only
def test_every_tab_on_a_phone_in_the_dark(browser, url):
    "Breaks when something is wider than the screen, or a colour is not told to the dark."
    page = open_page(browser, url, viewport=dict(width=390, height=844), color_scheme='dark')
    page.get_by_role('button', name='Generate', exact=True).wait_for()
    for name in TABS:
        tab(page, name)
        if name == 'Compare':
            page.get_by_role('button', name='Generate both').click()
            page.locator('.fd-pair .fd-card').nth(1).wait_for()
        if name == 'Blind test':
            page.get_by_role('button', name='Next pair').click()
            page.locator('.fd-two .fd-card').nth(1).wait_for()
        shot(page, f'phone-{name.split()[0].lower()}')
        wide = page.evaluate(
            'Math.max(document.documentElement.scrollWidth, document.querySelector(".fd").scrollWidth)'
        )
        out = page.evaluate(
            '[...document.querySelectorAll(".fd button, .fd input, .fd img, .fd select, .fd textarea")]'
            '.filter(e => e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 80))'
        )
        assert wide <= 390 and not out, (name, wide, out)
        light = page.evaluate(
            '[...document.querySelectorAll(".fd, .fd-panel, .fd-card, .fd select")]'
            '.map(e => getComputedStyle(e).backgroundColor)'
        )
        assert all(sum(map(int, re.findall(r'\d+', c)[:3])) < 200 for c in light), (name, light)


def test_a_backend_that_fails_midway(tmp_path, tiny_workspace):
    "Breaks when the session does not fall back, says nothing, or falls back when it is cancelled."
    shutil.copytree(tiny_workspace / 'model', tmp_path / 'model')
    shutil.copytree(tiny_workspace / 'onnx', tmp_path / 'onnx')
    code = f"""
from flowerdiff.apps.request import GenerationRequest
from flowerdiff.apps.session import GenerationSession
p = GenerationSession({str(tmp_path)!r})
plain = p.generate(GenerationRequest('a rose', backend='torch'))[0]
[d] = [p._generator(GenerationRequest('x', backend='onnx')).backend]; real, calls = d.denoise, []
def breaks(*a):
    calls.append(1)
    if len(calls) > 3: raise RuntimeError('the session is gone')
    return real(*a)
d.denoise = breaks; steps = []
request = GenerationRequest('a rose', backend='onnx', num_previews=4)
drawn = p.generate(request, lambda s: steps.append(s.step))[0]
print(len(calls), drawn.tobytes() == plain.tobytes(), steps[:5], drawn.info['note'])
def cancelled(s): return False
try: p.generate(GenerationRequest('a rose', backend='onnx'), cancelled)
except Exception as e: print(type(e).__name__)
"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV)
    first, second = said.stdout.strip().splitlines() or [said.stderr, '']
    assert (
        first
        == '4 True [1, 2, 3, 1, 2] ONNX Runtime failed (RuntimeError: the session is gone); '
        'PyTorch was used instead'
        and second == 'Cancelled'
    ), said


def test_a_damaged_export_is_no_reason_to_stop(tmp_path, tiny_workspace):
    "Breaks when `auto` gives up with the file that it likes best."
    shutil.copytree(tiny_workspace / 'model', tmp_path / 'model')
    shutil.copytree(tiny_workspace / 'onnx', tmp_path / 'onnx')
    for f in (tmp_path / 'onnx').rglob('*.onnx'):
        f.write_bytes(b'damaged')
    code = (
        'from flowerdiff.apps.request import GenerationRequest; '
        'from flowerdiff.apps.session import GenerationSession; '
        f'p = GenerationSession({str(tmp_path)!r}); print(p.generate('
        "GenerationRequest('a rose', backend='onnx', num_inference_steps=2))[0].info['note'], p.error)"
    )
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV)
    assert said.stdout.startswith('ONNX Runtime failed (') and said.stdout.strip().endswith(
        'PyTorch was used instead'
    ), said
