"""Small YAML files of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LARGEST_YAML = 1 << 20


def read_yaml(path: Path) -> Any:
    """What a small YAML file of plain values says.

    Raises:
        ValueError: why it is not one, in words that follow its name.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values; without references, of which a small file can make a value that nobody can print, and without
        keys that are there twice, of which the last would win."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"references (*{self.peek_event().anchor}) are not allowed")
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise yaml.YAMLError(f"key {key.value!r} is in line {lines[name]} and again in line {line}")
                lines[name] = line
            return node

    try:
        if path.is_dir() or (path.exists() and not path.is_file()):  # a device may have no end
            raise ValueError(f"cannot be read: {'Is a directory' if path.is_dir() else 'not a file'}")
        if path.stat().st_size > LARGEST_YAML:
            raise ValueError(f"is larger than {LARGEST_YAML:,} bytes")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError("is not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from error
