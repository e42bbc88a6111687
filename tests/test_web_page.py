"The page that draws in the browser: its JavaScript in Node.js against Python, and the page in Chromium."

import json
import os
import random
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser_fixture, browser_only, open_page  # noqa: F401
from diffusers import DPMSolverMultistepScheduler

from flowerdiff.apps.web_page import ASSETS, RUNTIME, page_schedule, page_tokenizer, write_web_page
from flowerdiff.models.vocabulary import Vocabulary, shorten

GARDEN_CLIP = ASSETS.parent / 'garden' / 'clip'
RUNTIME_FOLDER = Path(os.environ.get('FLOWERDIFF_ORT_WEB', '/tmp/flowerdiff-ort-web'))
needs_node = pytest.mark.skipif(not shutil.which('node'), reason='Node.js is not installed')
needs_runtime = pytest.mark.skipif(
    not all((RUNTIME_FOLDER / Path(name).name).is_file() for name in RUNTIME.files),
    reason=f'onnxruntime-web is not in {RUNTIME_FOLDER}: bash .ci/run downloads it',
)


def node(code: str, given, tmp_path):
    "Run a module that has the exports of draw.js as `page` and returns an object; `given` is its input."
    (tmp_path / 'given.json').write_text(json.dumps(given))
    script = f"""
    import {{ readFileSync }} from 'fs';
    import * as page from '{(ASSETS / 'draw.js').as_uri()}';
    const given = JSON.parse(readFileSync(process.argv[1]));
    {code}
    console.log(JSON.stringify(result));
    """
    command = ['node', '--input-type=module', '-e', script, str(tmp_path / 'given.json')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


PROMPTS = [
    'a red rose under a blue sky',
    "it's DON'T we've I'll",
    '',
    '  \t\n ',
    'Ünïcödé Straße, Ⅷ ² ½ ﬁ e\u0301',
    '日本語の花 3本',
    'İstanbul ΣΑΣ',
    'a\u00a0b\u2003c\ufeffd\u200be\x85f\x1fg',
    'emoji 🌹🌻!!! 🏳️‍🌈 ...',
    '<|endoftext|> rose <|startoftext|>x <|EndOfText|>',
    'x' * 300,
]


@needs_node
def test_tokens_are_pythons(tmp_path):
    "On chosen prompts and on random ones of letters, marks, digits and spaces of several alphabets."
    from transformers import CLIPTokenizer

    rng = random.Random(0)
    letters = "abc RSt '’!?.12٣é\u0301ß日花🌹Σς\u00a0\n-_<|>"
    prompts = PROMPTS + [''.join(rng.choices(letters, k=rng.randint(0, 40))) for _ in range(500)]
    (tmp_path / 'tokenizer').mkdir()
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(GARDEN_CLIP / name, tmp_path / 'tokenizer')
    card = page_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(GARDEN_CLIP)
    want = tokenizer(prompts, padding='max_length', truncation=True, max_length=card['length']).input_ids
    code = 'const t = new page.Tokenizer(given.card); const result = given.prompts.map((p) => t.encode(p));'
    got = node(code, dict(card=card, prompts=prompts), tmp_path)
    assert [p for p, a, b in zip(prompts, want, got) if a != b] == []


@needs_node
def test_long_prompts_are_read_as_in_python(tmp_path):
    "On random prompts of learned, rare and unknown words, with spaces and punctuation of several kinds."
    from flowerdiff.drawing.tokenizer import Tokenizer

    (tmp_path / 'tokenizer').mkdir()
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(GARDEN_CLIP / name, tmp_path / 'tokenizer')
    card = dict(
        tokenizer=page_tokenizer(tmp_path), words={'rose': 90, 'red': 70, 'a': 400, 'fenêtre': 3, '花': 5}
    )
    rng = random.Random(0)
    words = [
        'a',
        'red',
        'ROSE,',
        'off-red',
        'fene\u0302tre',
        '花花',
        'neighbor',
        "don't",
        '12',
        'ΣΑΣ',
        '—',
        'rose.',
    ]
    spaces = [' ', '  ', '\n', '\u00a0', '\x1f', '\u3000']
    prompts = [
        ''.join(rng.choice(words) + rng.choice(spaces) for _ in range(rng.randint(1, 40))).strip()
        for _ in range(300)
    ]
    tokenizer = Tokenizer(GARDEN_CLIP, card['tokenizer']['length'])
    vocabulary = Vocabulary(card['words'])

    def fits(text):
        return not tokenizer.unread(text)

    want = [text if fits(text) else shorten(text, fits, vocabulary)[0] for text in prompts]
    assert 50 < sum(a != b for a, b in zip(prompts, want)) < 250
    code = 'const m = new page.Model(null, given.card, {}); '
    code += 'const result = given.prompts.map((prompt) => m.readable(prompt));'
    got = node(code, dict(card=card, prompts=prompts), tmp_path)
    assert [p for p, a, b in zip(prompts, want, got) if a != b] == []


@needs_node
def test_noise_is_pytorchs(tmp_path):
    seeds = [0, 7, 2**31, 2**32 - 1]
    got = node('const result = given.map((seed) => [...page.noise(seed, 1040)]);', seeds, tmp_path)
    for seed, numbers in zip(seeds, got):
        want = torch.randn(1040, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(numbers, want.numpy(), atol=2e-6)


SCHEDULES = [
    {},
    dict(prediction_type='epsilon'),
    dict(prediction_type='sample', timestep_spacing='trailing'),
    dict(solver_order=1, timestep_spacing='trailing'),
    dict(rescale_betas_zero_snr=True, timestep_spacing='trailing'),
    dict(beta_schedule='squaredcos_cap_v2', lambda_min_clipped=-5.1),
]


@needs_node
def test_sampler_is_diffusers(tmp_path):
    "Timesteps and latents of each kind of schedule, for few steps and many, with a formula for the network."
    base = dict(
        beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', prediction_type='v_prediction'
    )
    cases, want = [], []
    for changes in SCHEDULES:
        scheduler = DPMSolverMultistepScheduler(**(base | changes))
        for steps in (1, 2, 7, 20, 33):
            scheduler.set_timesteps(steps)
            noise = x = torch.randn(1, 32, generator=torch.Generator().manual_seed(steps))
            for t in scheduler.timesteps:
                x = scheduler.step(torch.sin(2 * x + t / 300), t, x).prev_sample
            want.append((scheduler.timesteps.tolist(), x[0].tolist()))
            schedule = page_schedule(dict(scheduler.config) | dict(_class_name='DPMSolverMultistepScheduler'))
            cases.append(dict(schedule=schedule, steps=steps, noise=noise[0].tolist()))
    code = """
    const result = [];
    for (const { schedule, steps, noise } of given) {
      const network = async (x, t) => x.map((v) => Math.sin(2 * v + t / 300));
      const x = await page.sample(schedule, Float32Array.from(noise), steps, network);
      result.push([page.timesteps(schedule, steps), [...x]]);
    }
    """
    for case, (times, latents), (got_times, got) in zip(cases, want, node(code, cases, tmp_path)):
        assert got_times == times, case['steps']
        scale = max(1, np.abs(latents).max())
        np.testing.assert_allclose(np.array(got) / scale, np.array(latents) / scale, atol=2e-4)


@pytest.fixture(scope='module')
def served_page(tmp_path_factory):
    "The page of the miniature garden, and its address."
    from flowerdiff.core.workspace import demo_workspace
    from flowerdiff.inference.onnx_export import copy_configs, export_part, model_parts
    from flowerdiff.inference.torch_backend import TorchBackend

    model = demo_workspace('promote').model
    root = tmp_path_factory.mktemp('page')
    parts = model_parts(TorchBackend(model, 'cpu'))
    for name in ('text_encoder', 'unet', 'vae_decoder'):
        export_part(parts[name], root / 'garden' / name)
    copy_configs(model, root / 'garden')
    folder = write_web_page(root / 'garden', root / 'draw', prompts=['a rose'], runtime=RUNTIME_FOLDER)
    handler = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/', model
    server.shutdown()


IN_PAGE = """async () => {
  const { Model, toBytes } = await import('./draw.js');
  const ort = await import('./ort.wasm.bundle.min.mjs'); // as draw.js has set it up
  const sessions = {};
  for (const part of ['text_encoder', 'unet', 'vae_decoder'])
    sessions[part] = await ort.InferenceSession.create(`model/${part}.onnx`);
  const model = new Model(ort, await (await fetch('model.json')).json(), sessions);
  const pixels = await model.draw('a red rose', { seed: 5, steps: 6, guidance: 4, onStep: () => {} });
  return [...toBytes(pixels)];
}"""


@browser_only
@needs_runtime
def test_page_draws_what_python_draws(browser, served_page):
    "The form draws, shows and saves; no other site is asked; and the pixels are those of `Generator`."
    from flowerdiff import Generator

    address, model = served_page
    page = open_page(browser, address, viewport=dict(width=390, height=800))
    page.get_by_text('Ready.').wait_for()
    assert page.get_by_label('Prompt').input_value() == 'a rose' and page.evaluate('innerWidth') == 390
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    empty = page.evaluate('document.querySelector("canvas").toDataURL()')
    page.get_by_label('Prompt').fill('a red rose')
    page.get_by_label('Steps').fill('3')
    page.get_by_role('button', name='Draw').click()
    page.get_by_text('a red rose, seed 0: ').wait_for()
    assert page.evaluate('document.querySelector("canvas").toDataURL()') != empty
    assert page.get_by_role('img').get_attribute('aria-label') == 'a red rose, seed 0'
    with page.expect_download() as download:
        page.get_by_role('button', name='Save PNG').click()
    assert download.value.suggested_filename == 'a-red-rose-0.png'
    got = np.array(page.evaluate(IN_PAGE)).reshape(64, 64, 4)[..., :3]
    generator = Generator.from_pretrained(model, backend='torch')
    [want] = generator('a red rose', seed=5, num_inference_steps=6, guidance_scale=4)
    difference = np.abs(got - np.asarray(want, int))
    assert difference.max() <= 3 and (difference > 1).mean() < 0.001
    assert not page.foreign and not [m for m in page.said if 'favicon' not in m and '404' not in m]


@browser_only
@needs_runtime
def test_page_says_what_is_missing(browser, served_page):
    page = browser.new_context().new_page()
    page.route('**/model/unet.onnx', lambda route: route.fulfill(status=404))
    page.goto(served_page[0])
    page.get_by_text('The model was not loaded: model/unet.onnx: the server answers 404').wait_for()
    assert page.get_by_role('button', name='Draw').is_disabled()
