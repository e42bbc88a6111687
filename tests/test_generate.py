"Generation: the same images as stock Diffusers, whatever the batch, and one line for every bad request."

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import UNET, tiny_model

from flowerdiff.core.errors import Cancelled, UserError
from flowerdiff.drawing.multistep import SAMPLERS
from flowerdiff.inference import sampling_loop, torch_backend
from flowerdiff.inference.backends import load_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.inference.torch_backend import TorchBackend, cross_attentions
from flowerdiff.models.components import tensor_to_pil
from flowerdiff.models.vocabulary import count_words
from flowerdiff.services.hardware import why_not_compile


def pixels(pictures):
    return np.stack([np.asarray(p, int) for p in pictures])


def same(a, b):
    "The project's limit for equal images: 99.9 % of values within 1 of 255, none off by more than 4."
    difference = np.abs(pixels(a) - pixels(b))
    return (difference <= 1).mean() >= 0.999 and difference.max() <= 4


def run_threads(functions):
    "Run functions in threads and wait for all of them."
    threads = [threading.Thread(target=f) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def with_tiny_autoencoder(folder):
    "Change a model to another autoencoder and prediction type: AutoencoderTiny and epsilon."
    from diffusers import AutoencoderTiny

    torch.manual_seed(1)
    shutil.rmtree(folder / 'vae')
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    ).save_pretrained(folder / 'vae')
    for name, change in (
        ('model_index.json', dict(vae=['diffusers', 'AutoencoderTiny'])),
        ('scheduler/scheduler_config.json', dict(prediction_type='epsilon')),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return dict(kl=tiny_model(root / 'kl'), tiny=with_tiny_autoencoder(tiny_model(root / 'tiny')))


@pytest.fixture(scope='module')
def generator(models):
    return Generator.from_pretrained(models['kl'])


@pytest.fixture(scope='module')
def stock(models):
    from diffusers import StableDiffusionPipeline

    pipes = {kind: StableDiffusionPipeline.from_pretrained(folder) for kind, folder in models.items()}

    def generate(kind, prompts, seed=0, scheduler=None, **settings):
        import diffusers

        components = dict(pipes[kind].components)
        if scheduler:
            config = components['scheduler'].config
            spacing = dict(timestep_spacing='trailing') if scheduler == 'DDIMScheduler' else {}
            components['scheduler'] = getattr(diffusers, scheduler).from_config(config, **spacing)
        pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        rngs = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        return pipe(prompts, generator=rngs, **settings).images

    return generate


@pytest.mark.parametrize('kind', ['kl', 'tiny'])
@pytest.mark.parametrize('guidance', [1.0, 4.0])
def test_same_images_as_diffusers(models, stock, kind, guidance):
    prompts = ['a red rose', 'the sky', 'a white daisy in the meadow']
    ours = Generator.from_pretrained(models[kind])(
        prompts, seed=5, num_inference_steps=6, guidance_scale=guidance, negative_prompt='blue'
    )
    theirs = stock(
        kind, prompts, 5, num_inference_steps=6, guidance_scale=guidance, negative_prompt=['blue'] * 3
    )
    assert pixels(ours).std() > 5 and same(ours, theirs)


@pytest.mark.parametrize('name', ['ddim', 'ddpm', 'unipc', 'euler', 'dpm', 'lcm'])
def test_every_scheduler_gives_the_images_of_diffusers(generator, stock, name):
    ours = generator(['a red rose', 'the sky'], num_inference_steps=5, scheduler=name, guidance_scale=3.0)
    assert same(
        ours,
        stock(
            'kl',
            ['a red rose', 'the sky'],
            num_inference_steps=5,
            guidance_scale=3.0,
            scheduler=SAMPLERS[name],
        ),
    )


@pytest.mark.parametrize('mutation', ['guidance', 'scaling', 'noise', 'order'])
def test_the_comparison_notices_a_wrong_formula(models, stock, monkeypatch, mutation):
    "Each of these errors must make the images differ from those of Diffusers."
    generator = Generator.from_pretrained(models['tiny'])
    if mutation == 'guidance':
        monkeypatch.setattr(sampling_loop, 'guide', lambda u, c, w: c + w * (c - u))
    if mutation == 'order':
        monkeypatch.setattr(sampling_loop, 'guide', lambda u, c, w: c + w * (u - c))
    if mutation == 'scaling':
        generator.backend.scaling *= 1.05
    if mutation == 'noise':

        def same_noise(seed, n):
            return [torch.Generator().manual_seed(0) for _ in range(n)]

        monkeypatch.setattr(torch_backend, 'generators', same_noise)
    prompts = ['a red rose', 'the sky']
    settings = dict(num_inference_steps=6, guidance_scale=4.0)
    assert not same(generator(prompts, **settings), stock('tiny', prompts, **settings))


def test_an_image_does_not_depend_on_its_batch(generator, models):
    many = generator(['a red rose', 'the sky'], num_images_per_prompt=3, seed=10, num_inference_steps=4)
    for i, prompt in ((0, 'a red rose'), (2, 'a red rose'), (4, 'the sky')):
        assert same([many[i]], generator(prompt, seed=10 + i, num_inference_steps=4))
    assert same(
        many,
        Generator(generator.backend, batch=4)(
            ['a red rose', 'the sky'], num_images_per_prompt=3, seed=10, num_inference_steps=4
        ),
    )


@pytest.mark.parametrize('name', list(SAMPLERS))
def test_a_scheduler_starts_fresh_with_each_batch(generator, name):
    one, two = (
        Generator(generator.backend, batch=b)(
            'a red rose', num_images_per_prompt=2, num_inference_steps=5, scheduler=name
        )
        for b in (1, 2)
    )
    assert same(one, two) and not same(one[:1], one[1:])


def test_threads_do_not_disturb_each_other(generator):
    requests = [
        dict(prompt='a red rose', num_inference_steps=4, seed=3),
        dict(prompt='the sky', num_inference_steps=7, seed=3, scheduler='ddim'),
        dict(prompt='a white daisy', num_inference_steps=5, seed=3, scheduler='unipc'),
        dict(prompt='an iris', num_inference_steps=6, seed=3),
    ]
    alone = [generator(**request) for request in requests]
    together = {}

    def generate_twice(i):
        together[i] = [generator(**requests[i]) for _ in range(2)]

    run_threads([partial(generate_twice, i) for i in range(4)])
    assert sorted(together) == [0, 1, 2, 3]
    assert all(same(alone[i], images) for i, both in together.items() for images in both)


def test_one_text_pass_two_rows_per_step_one_decode(generator, monkeypatch):
    calls = []

    def count(name):
        real = getattr(generator.backend, name)

        def counted(x, *rest):
            calls.append((name, len(x)))
            return real(x, *rest)

        monkeypatch.setattr(generator.backend, name, counted)

    for name in ('encode', 'denoise', 'decode'):
        count(name)
    generator(['a red rose', 'the sky'], num_images_per_prompt=2, num_inference_steps=3)
    assert calls == [('encode', 3)] + [('denoise', 8)] * 3 + [('decode', 4)]
    calls.clear()
    generator('the sky', num_inference_steps=3, guidance_scale=1.0)
    assert [c for c in calls if c[0] == 'denoise'] == [('denoise', 1)] * 3
    calls.clear()
    generator('the sky', num_inference_steps=4, guidance_interval=(0.25, 0.75))
    assert [n for c, n in calls if c == 'denoise'] == [1, 2, 2, 1]


def test_a_text_is_encoded_once_and_the_cache_is_limited(models):
    backend = TorchBackend(models['kl'], 'cpu')
    encode_ids = backend.text
    batches = []

    def counted(ids):
        batches.append(len(ids))
        return encode_ids(ids)

    backend.text = counted
    generator = Generator(backend)
    generator('a red rose', num_inference_steps=1)
    generator('a red rose', num_inference_steps=1)
    generator(['an iris', 'a red rose'], num_inference_steps=1, negative_prompt='blue')
    assert batches == [2, 2]  # the rose and '', then the iris and 'blue'
    assert torch.equal(backend.encode(['a red rose'])[0], backend.cache['a red rose'].embedding)
    ids = backend.tokenizer(['the sky'], padding='max_length', max_length=16, return_tensors='pt').input_ids
    assert (backend.encode(['the sky']) - encode_ids(ids)).abs().max() < 1e-5

    def encode_many(i):
        for k in range(20):
            backend.encode([f'{j} roses in {k}' for j in range(i)])

    run_threads([partial(encode_many, i) for i in range(1, 6)])
    assert len(backend.cache) == backend.cache_size
    long = 'a red rose under the sky in the white yellow blue iris daisy sky sky meadow'
    for _ in range(2):
        with pytest.warns(UserWarning, match='longer than 16 tokens'):
            backend.encode([long])


def count_text_products(unet, function):
    "Call a function; return its result, its number of products with the text, and the number of matrices."
    calls = []
    hooks = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for name, module in unet.named_modules()
        if name.endswith(('attn2.to_k', 'attn2.to_v'))
    ]
    result = function()
    for hook in hooks:
        hook.remove()
    return result, len(calls), len(hooks)


def test_keys_and_values_of_the_text_are_computed_once_per_image(generator, models):
    b = generator.backend
    _, calls, matrices = count_text_products(b.unet, lambda: generator('a red rose', num_inference_steps=6))
    assert calls == matrices == 2 * len(b.cross_attentions) > 0
    text = b.encode(['a red rose', '', 'the sky'])
    z = torch.randn(3, 4, 16, 16)
    t = torch.tensor(321)
    plain = b.denoise(z, t, text)
    assert (plain - b.denoise(z, t, b.condition(text))).abs().max() < 1e-5
    assert (plain - b.denoise(z, t, b.condition(text.flip(0)))).abs().max() > 1e-5
    half = TorchBackend(models['kl'], 'cpu')
    half.unet.bfloat16()
    keys, _ = half.condition(text)[0]
    assert keys.dtype == torch.bfloat16
    assert (half.denoise(z, t, half.condition(text)) - plain).abs().max() < 0.05 * plain.abs().max()


def test_the_text_is_pooled_once_per_image(models, tmp_path):
    "With the images of Diffusers' own pipeline."
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = Path(shutil.copytree(models['kl'], tmp_path / 'm'))
    torch.manual_seed(0)
    pooled = dict(addition_embed_type='text', addition_embed_type_num_heads=2)
    unet = UNet2DConditionModel(sample_size=16, **UNET, **pooled)
    unet.add_embedding.norm2.weight.data *= 20  # so that the picture depends on it
    unet.save_pretrained(folder / 'unet')
    ours = Generator.from_pretrained(folder, backend='torch')
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    ours.backend.pooling.register_forward_hook(lambda *_: calls.append(1))
    settings = dict(num_inference_steps=3, guidance_scale=3.0)
    images = ours('a red rose', **settings)
    assert len(calls) == 1 and ours.backend.cross_attentions
    generator = torch.Generator().manual_seed(0)
    assert same(images, pipe('a red rose', generator=generator, **settings).images)
    assert not same(images, ours('the sky', **settings))


@pytest.mark.parametrize('kind', ['none', 'only', 'other'])
def test_a_unet_that_uses_its_text_in_another_way(models, tmp_path, kind):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    folder = Path(shutil.copytree(models['kl'], tmp_path / 'm'))
    torch.manual_seed(0)
    changes = dict(
        none=dict(
            down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2, mid_block_type=None
        ),
        only=dict(only_cross_attention=True),
        other=dict(down_block_types=('SimpleCrossAttnDownBlock2D', 'DownBlock2D')),
    )
    UNet2DConditionModel(sample_size=16, **UNET | changes[kind]).save_pretrained(folder / 'unet')
    ours = Generator.from_pretrained(folder, backend='torch')
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert not cross_attentions(ours.backend.unet)
    settings = dict(num_inference_steps=3, guidance_scale=3.0)
    theirs = pipe('a red rose', generator=torch.Generator().manual_seed(0), **settings).images
    assert same(ours('a red rose', **settings), theirs)


@pytest.fixture
def compiled_graphs(monkeypatch):
    "Replace the compiler behind torch.compile by none, and collect the input shapes of each compiled graph."
    import torch._dynamo as dynamo

    dynamo.reset()
    real = torch.compile
    graphs = []

    def no_compiler(graph, inputs):
        graphs.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda f, **options: real(f, backend=no_compiler, **options))
    yield graphs
    dynamo.reset()


def test_compiled_for_each_shape_and_the_same(models, generator, compiled_graphs):
    fast = Generator.from_pretrained(models['kl'], backend='torch-compile')
    assert fast.backend.name == 'torch-compile' and not compiled_graphs
    first = fast('a red rose', num_inference_steps=4)
    assert len(compiled_graphs) == 2  # the UNet and the decoder
    assert same(first, generator('a red rose', num_inference_steps=4))
    fast('a white daisy', num_inference_steps=6, seed=4)
    assert len(compiled_graphs) == 2
    larger = dict(num_images_per_prompt=2, size=48, num_inference_steps=3)
    assert same(fast('a red rose', **larger), generator('a red rose', **larger))
    assert len(compiled_graphs) == 4
    _, calls, matrices = count_text_products(
        fast.backend.unet, lambda: fast('an iris', num_inference_steps=5)
    )
    assert calls in (0, matrices)  # none in the steps
    images = {}

    def generate(i):
        images[i] = fast('a red rose', seed=i, num_inference_steps=4)

    run_threads([partial(generate, i) for i in range(3)])
    assert all(same(images[i], generator('a red rose', seed=i, num_inference_steps=4)) for i in range(3))


@pytest.mark.skipif(bool(why_not_compile()), reason='no C++ compiler')
def test_the_real_compiler_gives_the_same(models, generator):
    fast = load_backend(models['kl'], 'torch-compile')
    plain = generator.backend
    z = torch.randn(2, 4, 16, 16)
    text = plain.condition(plain.encode(['a red rose', '']))
    for t in (999, 20):
        difference = fast.denoise(z, torch.tensor(t), text) - plain.denoise(z, torch.tensor(t), text)
        assert difference.abs().max() < 1e-4


def test_a_missing_or_broken_compiler_is_reported(models, monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/c++')
    with pytest.raises(UserError, match=r'backend torch-compile: there is no C.. compiler ./nowhere/c..'):
        load_backend(models['kl'], 'torch-compile')
    monkeypatch.delenv('CXX')
    real = torch.compile

    def broken(graph, inputs):
        raise OSError('cannot execute\ncc1plus')

    monkeypatch.setattr(torch, 'compile', lambda f, **how: real(f, backend=broken, **how))
    with pytest.raises(UserError, match=r'the compiler failed .*cannot execute.*use the backend torch') as e:
        Generator.from_pretrained(models['kl'], backend='torch-compile')('a rose', num_inference_steps=1)
    assert '\n' not in str(e.value)


LIMITED_MEMORY = """import sys
sys.path[:0] = sys.argv[4:]
from train_worker import inject_fault
from flowerdiff.inference.backends import open_backend
from flowerdiff.inference.generator import Generator
from flowerdiff.core.workspace import UserError
import torch
torch.backends.mkldnn.enabled = False  # it fails in another way after a first failure
g = Generator(open_backend(sys.argv[1], sys.argv[2]), batch=64)
small = g('a rose', num_images_per_prompt=2, num_inference_steps=1)
inject_fault('memory', int(sys.argv[3]))
try:
    g('a rose', num_images_per_prompt=64, num_inference_steps=1, size=256)
    print('it fitted')
except UserError as e:
    print(e)
again = g('a rose', num_images_per_prompt=2, num_inference_steps=1)
assert [p.tobytes() for p in again] == [p.tobytes() for p in small]"""


@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
def test_a_batch_beyond_memory_is_reported_and_the_next_works(models):
    arguments = ['torch', str(models['kl']), '400', str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, '-c', LIMITED_MEMORY, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )
    message = (
        '64 images of 256 x 256 pixels at once do not fit into memory; generate fewer at once '
        '(batch or num_images_per_prompt below 64) or use a smaller size'
    )
    assert (done.stdout.splitlines() or [''])[-1] == message, done.stdout + done.stderr
    assert not done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    'raised',
    [
        MemoryError(),
        torch.OutOfMemoryError('CUDA out of memory. Tried'),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError('could not create a primitive'),
        Exception('[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation'),
        Exception('Failed to allocate memory for requested buffer of size 9'),
        RuntimeError('std::bad_alloc'),
    ],
    ids=lambda e: str(e)[:20] or type(e).__name__,
)
@pytest.mark.parametrize('where', ['encode', 'denoise', 'decode'])
def test_every_out_of_memory_error_is_recognized(generator, raised, where, monkeypatch):
    def fail(*_):
        raise raised

    monkeypatch.setattr(generator.backend, where, fail)
    message = '^3 images of 32 x 32 pixels at once do not fit into memory; generate fewer'
    with pytest.raises(UserError, match=message) as e:
        generator('a rose', num_images_per_prompt=3, num_inference_steps=1)
    assert '\n' not in str(e.value)
    message = '^1 image of 32 x 32 pixels does not fit into memory; use a smaller size$'
    with pytest.raises(UserError, match=message):
        generator('a rose', num_inference_steps=1)


def test_another_error_is_not_memory(generator):
    class Wrong:
        def __getattr__(self, name):
            return getattr(generator.backend, name) if name != 'decode' else lambda *_: 1 / 0

    with pytest.raises(ZeroDivisionError):
        Generator(Wrong())('a rose', num_inference_steps=1)


def test_a_callback_gets_steps_and_previews_and_can_cancel(generator):
    seen = []

    def keep(step):
        seen.append((step.step, step.steps, [p.size for p in step.preview(48)]))

    generator('a rose', num_images_per_prompt=3, num_inference_steps=4, callback=keep)
    assert [(step, steps) for step, steps, _ in seen] == [(i, 4) for i in (1, 2, 3, 4)]
    assert seen[0][2] == [(48, 48)] * 3
    count = []

    def cancel(step):
        count.append(step)
        return step.step < 2

    with pytest.raises(Cancelled):
        generator('a rose', num_inference_steps=9, callback=cancel)
    assert len(count) == 2
    batches = []

    def keep_batch(step):
        batches.append((step.step, step.steps, len(step.latents)))

    two = Generator(generator.backend, batch=2)
    two('a rose', num_images_per_prompt=3, num_inference_steps=2, callback=keep_batch)
    assert batches == [(1, 4, 2), (2, 4, 2), (3, 4, 1), (4, 4, 1)]


def test_the_last_estimate_decodes_to_the_image(generator):
    last = []
    images = generator('a red rose', num_inference_steps=12, callback=lambda step: last.append(step.latents))
    decoded = tensor_to_pil(generator.backend.decode(last[-1]))
    assert np.abs(pixels(decoded) - pixels(images)).max() <= 4


def test_a_long_prompt_keeps_the_words_that_the_model_knows(generator, monkeypatch):
    "Fails if the end is cut off: the flower stands there."
    story = 'yesterday my neighbor said how much she loves a red rose in the meadow'
    monkeypatch.setattr(generator, 'vocabulary', count_words(['a red rose in the meadow'] * 3))
    with pytest.warns(UserWarning, match='longer than 16 tokens; not read: "yesterday my neighbor'):
        long = generator(story, seed=4, num_inference_steps=1)
    read = generator.readable(story)
    assert read.endswith('a red rose in the meadow') and len(read) < len(story)
    assert long[0].info['settings'].prompt == story
    assert np.array_equal(pixels(long), pixels(generator(read, seed=4, num_inference_steps=1)))
    assert generator.readable('a red rose') == 'a red rose'


def test_a_long_prompt_is_cut_off_with_a_warning(generator):
    with pytest.warns(UserWarning, match=r'longer than 16 tokens; not read: .*meadow'):
        long = generator(
            'a red rose under the sky in the white yellow blue iris daisy sky sky meadow',
            num_inference_steps=1,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'prompt')
        generator('a red rose', num_inference_steps=1)
    assert long[0].size == (32, 32)


def test_other_sizes(generator):
    assert generator('a rose', num_inference_steps=1, size=(48, 16))[0].size == (48, 16)


@pytest.mark.parametrize(
    'request_, message',
    [
        (dict(num_inference_steps=0), 'num_inference_steps: 0 is not'),
        (dict(num_inference_steps=10**9), 'num_inference_steps: '),
        (dict(num_inference_steps='many'), 'num_inference_steps: many'),
        (dict(num_inference_steps=10**400), 'num_inference_steps: 1'),
        (dict(size=(1, 2, 3)), 'size: (1, 2, 3) is not'),
        (dict(size='big'), 'width: big'),
        (dict(negative_prompt=None), 'negative_prompt: must be text'),
        (dict(negative_prompt='\x00PNG'), 'negative_prompt: contains bytes'),
        (dict(negative_prompt='no ' * 10**5), 'negative_prompt: has 300,000'),
        (dict(num_images_per_prompt=0), 'num_images_per_prompt: 0'),
        (dict(num_images_per_prompt=10**7), 'num_images_per_prompt: '),
        (dict(seed=-1), 'seed: -1'),
        (dict(seed=1.5), 'seed: 1.5'),
        (dict(guidance_scale=-1), 'guidance_scale: -1'),
        (dict(guidance_scale=float('nan')), 'guidance_scale: nan'),
        (dict(size=33), 'width: 33 is not a multiple of 4'),
        (dict(size=10**6), 'width: '),
        (dict(size=(32, 0)), 'height: 0'),
        (dict(scheduler='magic'), 'scheduler: '),
        (dict(scheduler='lcm', num_inference_steps=60), 'scheduler: lcm does not support 60 steps'),
        (dict(guidance_interval=(0, 2)), 'guidance_interval: 2'),
        (dict(guidance_interval='all'), 'guidance_interval: all is not two shares'),
        (dict(prompt=[]), 'prompt: the list is empty'),
        (dict(prompt=' '), 'prompt: is empty'),
        (dict(prompt=None), 'prompt: '),
        (dict(prompt='rose ' * 10**5), 'prompt: has 500,000 characters'),
        (dict(prompt='\x89PNG\x00\x1a'), 'prompt: contains bytes'),
        (dict(prompt=b'rose'), 'prompt: '),
    ],
)
def test_a_bad_request_gets_one_line(generator, request_, message):
    with pytest.raises(UserError) as e:
        generator(**dict(prompt='a rose') | request_)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


def test_a_bad_batch_size_gets_one_line(generator):
    for batch in (0, -1, 'many'):
        with pytest.raises(UserError, match=f'^batch: {batch} is not'):
            Generator(generator.backend, batch=batch)('a rose')


def damage(folder, how):
    weights = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
    if how == 'truncated':
        weights.write_bytes(weights.read_bytes()[:-1000])
    if how == 'not safetensors':
        weights.write_bytes(b'PK\x03\x04 a pickle')
    if how == 'no weights':
        weights.unlink()
    if how == 'no tokenizer':
        shutil.rmtree(folder / 'tokenizer')
    if how == 'no autoencoder':
        shutil.rmtree(folder / 'vae')
    if how == 'bad json':
        (folder / 'unet' / 'config.json').write_text('{')
    if how == 'no such scheduler':
        (folder / 'scheduler' / 'scheduler_config.json').write_text('{"_class_name": "Magic"}')
    if how == 'unknown schedule':
        (folder / 'scheduler' / 'scheduler_config.json').write_text(
            '{"_class_name": "DDIMScheduler", "beta_schedule": "wavy"}'
        )
    if how == 'other pipeline':
        (folder / 'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
    if how == 'half the weights':
        from safetensors.torch import load_file, save_file

        kept = dict(list(load_file(weights).items())[::2])
        save_file(kept, weights, metadata=dict(format='pt'))
    if how == 'half a text encoder':
        from safetensors.torch import load_file, save_file

        path = folder / 'text_encoder' / 'model.safetensors'
        kept = dict(list(load_file(path).items())[::2])
        save_file(kept, path, metadata=dict(format='pt'))
    return folder


@pytest.mark.parametrize(
    'how',
    [
        'truncated',
        'not safetensors',
        'no weights',
        'no tokenizer',
        'no autoencoder',
        'bad json',
        'no such scheduler',
        'unknown schedule',
        'other pipeline',
        'half the weights',
        'half a text encoder',
    ],
)
def test_a_broken_model_gets_one_line_that_names_the_part(models, tmp_path, how):
    folder = damage(Path(shutil.copytree(models['kl'], tmp_path / 'm')), how)
    with pytest.raises(UserError) as e:
        Generator.from_pretrained(folder)
    assert '\n' not in str(e.value) and str(folder) in str(e.value)


def test_what_can_be_loaded(models, tmp_path, monkeypatch):
    shutil.copytree(models['kl'], tmp_path / 'ws' / 'model')
    assert Generator.from_pretrained(tmp_path / 'ws').backend.folder == tmp_path / 'ws' / 'model'
    for where, line in (
        (tmp_path, 'not a model folder'),
        (tmp_path / 'no' / 'such', 'not there'),
        ('/', 'not a model folder'),
    ):
        with pytest.raises(UserError, match=line):
            Generator.from_pretrained(where)
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'params.yaml').write_text('')
    with pytest.raises(UserError, match='no model yet'):
        Generator.from_pretrained(tmp_path / 'new')
    with pytest.raises(UserError, match='abacus'):
        Generator.from_pretrained(models['kl'], backend='abacus')
    import huggingface_hub

    asked = {}

    def download(repo, revision, allow_patterns, local_files_only):
        asked.update(repo=repo, revision=revision, allow=allow_patterns)
        return models['kl']

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert load_backend('someone/flowers@0123abc').folder == models['kl']
    assert asked['repo'] == 'someone/flowers'
    assert asked['revision'] == '0123abc'
    assert not any(p.endswith(('.bin', '.pkl', '.pt', '.py')) for p in asked['allow'])

    def no_network(*args, **kwargs):
        raise OSError('no network\nat all')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', no_network)
    with pytest.raises(UserError, match='cannot be downloaded') as e:
        load_backend('someone/flowers')
    assert '\n' not in str(e.value)


LIGHT_IMPORTS = """import sys
import flowerdiff.evaluation.report
assert 'torch' not in sys.modules and 'jinja2' not in sys.modules
import flowerdiff.inference.generator, flowerdiff.inference.backends
assert not {'diffusers', 'transformers', 'onnxruntime'} & set(sys.modules)"""


def test_imports_are_light():
    "Importing the report and the generator loads no large library."
    subprocess.run([sys.executable, '-c', LIGHT_IMPORTS], check=True)
