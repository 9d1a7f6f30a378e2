"""`flexmoe demo`: owners train experts on real text, the experts are composed, and one owner opts out.

Needs the extra `demo`: `pip install 'flexmoe[demo]'`. Only the command line and benchmarks import it.
"""

try:
    from flexmoe.demo.pipeline import DemoSettings, run_demo
except ModuleNotFoundError as error:
    if (error.name or "").startswith("flexmoe"):
        raise
    raise ImportError(f"The demo needs {error.name}, which is not installed: pip install 'flexmoe[demo]'.") from error

__all__ = ["DemoSettings", "run_demo"]
