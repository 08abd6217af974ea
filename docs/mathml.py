"""A hook of mkdocs: fences named ``math`` hold LaTeX and become MathML, which needs no script."""

from latex2mathml.converter import convert


def on_config(config):
    """Add the fence."""
    options = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fence = {"name": "math", "class": "math", "format": _as_mathml}
    options.setdefault("custom_fences", []).append(fence)
    return config


def _as_mathml(source, language, css_class, options, md, **kwargs) -> str:
    formulas = (convert(line, display="block") for line in source.splitlines() if line.strip())
    return f'<div class="{css_class}">{"".join(formulas)}</div>'
