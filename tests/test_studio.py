"""The studio in a real browser: words are typed, the right picture comes.

FLOWERDIFF_TEST_GARDEN=WORKSPACE serves a trained garden, whose pictures the classifier checks. Else a tiny
random model is served, whose pictures are compared with the Generator pixel by pixel.
FLOWERDIFF_TEST_SHOTS=FOLDER keeps screenshots."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest
from browser import (
    ENV,
    GARDEN,
    browser_fixture,  # noqa: F401
    browser_only,
    draw,
    fill,
    kernels,
    open_page,
    says,
    served,
    shot,
    studio_fixture,  # noqa: F401
    visitor,
)
from PIL import Image

from flowerdiff.drawing.pictures import read_picture


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    if GARDEN:
        return Path(GARDEN)
    from tiny import tiny_model

    folder = tmp_path_factory.mktemp('studio') / 'meadow'
    for k, size in dict(model=32, student=48).items():
        tiny_model(folder / k, size)
    tiny_model(folder / 'work' / 'previous', 16)
    (folder / 'student' / 'train_settings.json').write_text('{"train": {"distill": 4}}')
    return folder


@pytest.fixture(scope='module')
def url(studio):
    return studio[1]


@pytest.fixture(scope='module')
def page(browser, url):
    return visitor(browser, url)  # one for most tests: a kernel costs seconds


def readout(page, i):
    return page.locator('.fd-controls .widget-readout').nth(i)  # what the slider says


def own(folder, request):
    "What a Generator draws with as many threads as the server has: the last bit depends on them."
    code = (
        f'from flowerdiff import Generator; Generator.from_pretrained({str(folder)!r})('
        f'{request["prompt"]!r}, seed={request["seed"]}, '
        f'num_inference_steps={request["num_inference_steps"]}, '
        f'guidance_scale={request["guidance_scale"]})[0].save({str(folder / "own.png")!r})'
    )
    subprocess.run([sys.executable, '-c', code], check=True, env=ENV)
    return np.array(Image.open(folder / 'own.png'))


@browser_only
def test_the_right_picture(page, workspace):
    picture = draw(page, 'a red rose under a blue sky', 7)
    with page.expect_download() as d:
        page.get_by_role('link', name='Download').first.click()
    assert d.value.suggested_filename == 'a-red-rose-under-a-blue-sky-7.png'
    file = Image.open(d.value.path())
    settings = read_picture(d.value.path())
    assert np.array_equal(np.array(file), np.array(picture))
    assert (settings.prompt, settings.seed) == ('a red rose under a blue sky', 7)
    shot(page, 'picture')
    if GARDEN:
        from flowerdiff.models.attribute_classifier import load_classifier

        seen = load_classifier().names([picture] + [draw(page, seed=s) for s in (8, 9, 10)])
        right = [dict(species='rose', color='red', background='blue sky').items() <= s.items() for s in seen]
        assert sum(right) >= 3, seen
    else:
        assert np.array_equal(own(workspace, vars(settings)), np.array(picture))
        other = draw(page, 'a blue iris', 7)
        assert np.abs(np.array(other).astype(int) - np.array(picture)).mean() > 2
    assert page.foreign == []


@browser_only
def test_same_seed_same_picture_and_reuse(page):
    first = draw(page, 'a yellow rose', 11)
    draw(page, 'a white daisy', 12)
    page.locator('.fd-card').nth(1).get_by_role('button', name='Use again').click()
    says(page.locator('.fd-prompt textarea'), 'a yellow rose')
    says(page.get_by_label('Seed', exact=True), 11)
    assert np.array_equal(np.array(draw(page)), np.array(first))


@browser_only
@pytest.mark.skipif(bool(GARDEN), reason='a garden has no such models')
@pytest.mark.parametrize(
    'model, label, steps, guidance',
    [('student', 'Student', 4, 1.0), ('work/previous', 'Previous champion', 20, 4.0)],
)
def test_another_model_of_the_workspace(page, workspace, model, label, steps, guidance):
    # a session that opens the champion whatever is asked for; controls that stay when another model is chosen
    page.get_by_label('Model', exact=True).select_option(label=label)
    for i, said in enumerate((str(steps), f'{guidance:.1f}'), 1):
        readout(page, i).get_by_text(said, exact=True).wait_for()
    drawn = draw(page, 'a red rose', 5)
    assert (
        page.locator('.fd-card small').first.inner_text()
        == f'seed 5 · {steps} steps · guidance {guidance:g} · {label}'
    )
    assert np.array_equal(
        own(
            workspace / model,
            dict(prompt='a red rose', seed=5, num_inference_steps=steps, guidance_scale=guidance),
        ),
        np.array(drawn),
    )
    page.get_by_label('Model', exact=True).select_option(index=0)
    readout(page, 1).get_by_text('20', exact=True).wait_for()


@browser_only
def test_no_words_are_the_example(page):
    # a request of the empty field; blanks that count as words
    fill(page, 'Prompt', '  ')
    draw(page)
    assert (
        page.locator('.fd-card figcaption')
        .first.inner_text()
        .startswith(page.locator('.fd-prompt textarea').get_attribute('placeholder') + '\n')
    )


@browser_only
def test_several_pictures_and_their_seeds(page):
    slider = page.locator('.fd-controls').get_by_role('slider').first
    slider.focus()
    # 5 more at once: the last of many changes may reach the kernel after the click on Generate
    page.keyboard.press('PageUp')
    n = page.locator('.fd-card').count()
    draw(page, 'a red iris', 20)
    page.locator('.fd-card').nth(n + 5).wait_for()
    assert [
        re.search(r'seed (\d+)', t).group(1) for t in page.locator('.fd-card small').all_inner_texts()[:6]
    ] == ['25', '24', '23', '22', '21', '20']
    shot(page, 'several')
    slider.focus()
    page.keyboard.press('Home')


@browser_only
def test_cancel(page):
    for slider in (0, 1):  # pictures and steps: else it may be done before Cancel is pressed
        page.locator('.fd-controls').get_by_role('slider').nth(slider).focus()
        page.keyboard.press('End')
    n = page.locator('.fd-card').count()
    page.get_by_role('button', name='Generate', exact=True).click()
    page.get_by_role('button', name='Cancel').click()
    page.get_by_text('Canceled.').wait_for()
    assert page.locator('.fd-card').count() == n and page.locator('.fd-preview').count() == 0
    page.get_by_role('button', name='Generate', exact=True).and_(page.locator(':enabled')).wait_for()
    page.locator('.fd-card').first.get_by_role('button', name='Use again').click()  # the steps, too
    readout(page, 1).get_by_text('20', exact=True).wait_for()


@browser_only
def test_quick_fingers_on_a_slow_line(page, studio):
    "Breaks when words are lost that were typed before the kernel answered the first letter."
    # a field that is sent letter by letter: ipywidgets holds letters back until an answer, but not clicks
    fill(page, 'Prompt', '')
    draw(page)
    n, words, kernel = (
        page.locator('.fd-card').count(),
        'a white daisy under a blue sky',
        kernels(studio[0])[0],
    )
    kernel.suspend()
    try:
        page.locator('.fd-prompt textarea').press_sequentially(words)
        page.get_by_role('button', name='Generate', exact=True).click()
    finally:
        kernel.resume()
    page.locator('.fd-card').nth(n).wait_for()
    assert page.locator('.fd-card figcaption').first.inner_text().startswith(words + '\n')
    page.get_by_text(re.compile('1 picture in')).wait_for()


@browser_only
def test_what_people_type_is_text(page):
    words = '<img src=x onerror="document.title=\'owned\'"> & "rose"'
    draw(page, words)
    assert (
        page.locator('.fd-card figcaption').first.inner_text().startswith(words)
        and page.title() == 'flowerdiff studio'
    )
    fill(page, 'Prompt', 'rose ' * 200)
    page.get_by_role('button', name='Generate', exact=True).click()
    page.get_by_text('At most 500 are allowed').wait_for()
    shot(page, 'too-long')


@browser_only
def test_an_example_fills_the_field(page):
    chip = page.locator('.fd-chip').first
    words = chip.inner_text()
    chip.click()
    says(page.locator('.fd-prompt textarea'), words)


@browser_only
def test_a_phone_in_the_dark(browser, url):
    page = open_page(browser, url, viewport=dict(width=390, height=844), color_scheme='dark')
    page.get_by_role('button', name='Generate', exact=True).wait_for()
    draw(page, 'a red rose')
    wide = page.evaluate('document.querySelector(".fd").scrollWidth')
    dark = page.evaluate('getComputedStyle(document.querySelector(".fd")).backgroundColor')
    ask, card, controls = (
        page.locator(x).first.bounding_box() for x in ('.fd-request', '.fd-card', '.fd-controls')
    )
    shot(page, 'phone-dark')
    assert wide <= 390 and sum(map(int, re.findall(r'\d+', dark)[:3])) < 150
    assert (
        ask['x'] >= 0
        and ask['x'] + ask['width'] <= 390
        and ask['y'] + ask['height'] <= card['y']
        and card['y'] + card['height'] <= controls['y']
    )


def one_line(page, words):  # in red, and nothing else
    page.locator('.fd-status.bad').get_by_text(words).wait_for()
    assert '\n' not in page.locator('.fd-status.bad').inner_text() and 'Traceback' not in page.content()


@browser_only
def test_a_damaged_model_is_one_line(browser, tmp_path):
    "The page says it, draws with another model meanwhile, and with the first one when that is whole again."
    # `error_message` with more than its first line; a damaged champion that blocks every model
    from tiny import tiny_model

    folder, good = tmp_path / 'empty', tiny_model(tmp_path / 'good')
    shutil.copytree(good, folder / 'work' / 'previous')
    shutil.copytree(good, folder / 'model')
    weights = next((folder / 'model' / 'unet').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:20_000])
    with served(folder) as (_, url):
        page = open_page(browser, url)
        one_line(page, 'Champion, unet: cannot be opened; copy it again')
        shot(page, 'damaged')
        page.get_by_role('button', name='Generate', exact=True).click()
        page.locator('.fd-status:not(.bad)').or_(page.locator('.fd-status.bad')).first.wait_for()
        one_line(page, 'Champion, unet: cannot be opened; copy it again')
        page.get_by_label('Model', exact=True).select_option(label='Previous champion')
        page.get_by_role('button', name='Generate', exact=True).click()
        page.locator('.fd-card').first.wait_for()
        page.get_by_label('Model', exact=True).select_option(label='Champion')
        shutil.rmtree(folder / 'model')
        shutil.copytree(good, folder / 'model')
        assert draw(page, 'a red rose', 5).size == (32, 32)


def test_only_this_machine_is_answered(url):
    "Breaks when a page whose name points here (DNS rebinding) is answered, or an address chooses the theme."
    # no `ForeignName` before Voila's handlers, or only before some; `allow_theme_override` as it is
    port = url.rpartition(':')[2]
    for path in ('/', '/voila/static/voila.js', '/api/kernels', '/nothing'):
        for host in ('evil.example', f'localhost.evil.example:{port}', '192.168.1.7', ''):
            with pytest.raises(HTTPError) as told:
                urlopen(Request(url + path, headers={'Host': host}), timeout=60)
            assert told.value.code == 403, (path, host)
    mark = '"><script>alert(1)</script>'
    asked = f'{url}/?{urlencode(dict(theme=mark, template="lab"))}'
    page = urlopen(Request(asked, headers={'Host': f'localhost:{port}'}), timeout=120).read().decode()
    assert 'fd-disconnected' in page and mark not in page  # our template


def test_without_a_model_it_says_so_and_ends(cli, tmp_path):
    from flowerdiff.core.workspace import open_workspace

    open_workspace(tmp_path / 'meadow', 'garden')
    done = cli('studio', tmp_path / 'meadow')
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert 'holds no model yet; `flowerdiff run' in done.stderr


def test_a_port_in_use_is_one_line(cli, tmp_path):
    # `serve` without `check_port`, or a command line that shows its traceback
    (tmp_path / 'model_index.json').touch()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        done = cli('studio', tmp_path, '--port', s.getsockname()[1])
    assert (
        done.returncode == 2
        and not done.stdout
        and len(done.stderr.splitlines()) == 1
        and 'in use' in done.stderr
        and '--port' in done.stderr
    ), done


def test_the_studio_needs_nothing_of_training():
    code = (
        'import sys, flowerdiff.apps.studio; print([m for m in sys.modules '
        "if m.split('.')[0] in ('torch', 'diffusers', 'accelerate', 'mlflow', 'voila') "
        "or m in ('flowerdiff.training.accelerator', 'flowerdiff.stages.train')])"
    )
    assert (
        subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV).stdout.strip()
        == '[]'
    )
