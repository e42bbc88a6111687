"From a folder of pictures to a deployed text-to-image model, in ten notebooks. Names are loaded when they are first used."
__version__ = "0.1.0"

_PLACES = dict(Generator='sampler', load_profile='config', UserError='config', run='pipeline', status='pipeline', demo_workspace='workspace',
               **{f'run_{s}': f'stages.{s}' for s in ('prepare', 'caption', 'encode', 'upload', 'train', 'promote', 'evaluate', 'onnx', 'tensorrt', 'publish')})
__all__ = list(_PLACES)

def __getattr__(name):
    if name not in _PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'{__name__}.{_PLACES[name]}'), 'run' if name.startswith('run_') else name)
    return value

def __dir__(): return [*globals(), *_PLACES]
