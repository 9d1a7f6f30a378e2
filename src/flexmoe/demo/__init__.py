"""The main job on real text, end to end: `flexmoe demo`. Needs the extra: `pip install 'flexmoe[demo]'`.

Does not cover: anything that the library itself needs; apart from the command line nothing imports it.
"""

try:
    from flexmoe.demo.pipeline import DemoSettings, run_demo
except ModuleNotFoundError as error:
    if (error.name or "").startswith("flexmoe"):
        raise
    raise ImportError(f"The demo needs {error.name}, which is not installed: pip install 'flexmoe[demo]'.") from error

__all__ = ["DemoSettings", "run_demo"]
