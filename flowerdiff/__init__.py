"From a folder of pictures to a deployed text-to-image model, in ten notebooks. Names are loaded when they are first used."

__version__ = "0.1.0"

_MODULES = {
    'Generator': 'inference.generator',
    'load_profile': 'core.profiles',
    'UserError': 'core.profiles',
    'demo_workspace': 'core.workspace',
    'run': 'pipeline.pipeline',
    'status': 'pipeline.pipeline',
}
_STAGES = ('prepare', 'caption', 'encode', 'upload', 'train', 'promote', 'evaluate', 'onnx', 'tensorrt', 'publish')
_MODULES |= {f'run_{stage}': f'stages.{stage}' for stage in _STAGES}
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module

    module = import_module(f'{__name__}.{_MODULES[name]}')
    value = getattr(module, 'run' if name.startswith('run_') else name)
    globals()[name] = value
    return value


def __dir__():
    return [*globals(), *_MODULES]
