"""Commands whose parsers are made when they are called.

Typer makes the parser of every command before it looks at the first word; of some thirty that
takes as long as importing Typer. To list them, their names and docstrings are enough.
"""

from __future__ import annotations

from typing import Any

import typer
from typer import core
from typer import main as typer_main

#: How Typer is to make a parser: as `toolkit.cli.app` says for the whole.
PLAIN: dict[str, Any] = {"pretty_exceptions_short": True, "rich_markup_mode": None}


class _Name(core.TyperCommand):
    """A command of which only name and help are known yet."""


def group_of(commands: typer.Typer) -> type[core.TyperGroup]:
    """Return the class of a group that makes the commands registered in `commands` when called.

    Parameters
    ----------
    commands : typer.Typer
        The commands and groups, in their order.
    """
    single = {
        info.name or typer_main.get_command_name(info.callback.__name__): info
        for info in commands.registered_commands
        if info.callback
    }
    groups = {str(info.name): info for info in commands.registered_groups}

    class Group(core.TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            for name, info in single.items():
                text = info.help or (info.callback and info.callback.__doc__)
                self.commands[name] = _Name(name, help=text)
            for name, group in groups.items():
                text = typer_main.solve_typer_info_help(group)
                self.commands[name] = _Name(name, help=text)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if isinstance(self.commands.get(cmd_name), _Name):
                self.commands[cmd_name] = (
                    typer_main.get_command_from_info(single[cmd_name], **PLAIN)
                    if cmd_name in single
                    else typer_main.get_group_from_info(
                        groups[cmd_name], suggest_commands=False, **PLAIN
                    )
                )
            return super().get_command(ctx, cmd_name)

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            width = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section("Commands"):
                formatter.write_dl(
                    [
                        (name, command.get_short_help_str(width))
                        for name, command in self.commands.items()
                    ]
                )

    return Group
