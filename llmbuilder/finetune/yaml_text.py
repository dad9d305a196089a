"""YAML as people write settings in it: a key that stands twice is a mistake, not the second one's value."""

from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe one, which takes the last of equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in keys:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"'{key}' is given twice, the second time in line {line}: keep one of them")
                keys.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """What a text in YAML says. Raises ConfigError, with ``where`` in front, for another text or for a key twice."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
