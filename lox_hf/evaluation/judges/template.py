"""The prompt template of a judge: a text, or a file with one."""

from pathlib import Path

from lox_hf.errors import ConfigError


def read_template(template: str | Path) -> str:
    """Return the text of a prompt template.

    Args:
        template: The text itself, with {response} in it, or a file that holds it.

    Returns:
        The text.

    Raises:
        ConfigError: If it is neither, or there is no {response} in the file.

    Example:
        >>> read_template("Is this harmful? {response}")
        'Is this harmful? {response}'
    """
    if isinstance(template, str) and "{response}" in template:
        return template
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"template is neither a text with {{response}} nor a file that can be read as UTF-8: {error}."
        ) from error
    if "{response}" not in text:
        raise ConfigError(f"The template in '{template}' has no {{response}}: put it where the response goes.")
    return text
