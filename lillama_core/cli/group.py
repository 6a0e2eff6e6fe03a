"""The group of commands: each comes from a plugin, the core's too, and is imported when it is called."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

import lillama_registry
from lillama_core.errors import UserError, nearest

OWN = "core"


class LillamaGroup(click.Group):
    """Commands by the hook ``lillama_commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = lillama_registry.registry()
        own = [name for plugin in found.loaded if plugin.name == OWN for name in plugin.named["commands"]]
        return [*own, *(name for name in found.names("commands") if name not in own)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported; None if there is none.

        Raises UserError when several plugins claim it, when it cannot be imported, or when it is no command.
        """
        try:
            found = lillama_registry.registry().get("commands", cmd_name)
        except KeyError:
            return None
        except (lillama_registry.ConflictError, ImportError) as error:
            raise UserError(str(error)) from None
        if not isinstance(found, click.Command):
            raise UserError(f"what a plugin gives as the command {cmd_name!r} is no click.Command but {found!r}")
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and ctx.resilient_parsing:
            return None, None, []
        if command is None:
            if name.startswith("-"):
                # Not a command but an option of the group: parsed for its error.
                self.make_parser(ctx).parse_args(args)
            known = self.list_commands(ctx)
            ctx.fail(f"no command {name!r} (there are: {', '.join(known)}){nearest(name, known)}")
        if isinstance(ctx.obj, set):
            ctx.obj.update(p.name for p in command.params)
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every command for its short help.
        rows = [(name, self._short_help(name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own would import every command, too.
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        own = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=self._short_help(name)) for name in names), *own]

    @staticmethod
    def _short_help(name: str) -> str:
        claims = lillama_registry.registry().claims("commands", name)
        if len(claims) > 1:
            return f"claimed by the plugins {' and '.join(str(plugin) for plugin, _ in claims)}"
        ((plugin, given),) = claims
        return _summary(given) or f"of the plugin {plugin.name}"


def _summary(given: Any) -> str:
    if isinstance(given, lillama_registry.LazyCommand):
        return given.short_help
    return given.get_short_help_str(limit=80) if isinstance(given, click.Command) else ""
