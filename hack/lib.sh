# shellcheck shell=bash
# Functions shared by the scripts that build what tests and the demo need.
# Source this file after `set -euo pipefail`.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CACHE="${COMPSC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/compsc}"
export ROOT CACHE

# log MESSAGE...: one line of progress, with the time.
log() { printf '%(%H:%M:%S)T  %s\n' -1 "$*" >&2; }

# die MESSAGE...: says what is wrong and ends the script.
die() { log "ERROR: $*"; exit 1; }

# step DESCRIPTION COMMAND...: runs a command, says so, and how long it took.
# The command's output is shown only if it fails. The command must not rely on
# `set -e` to notice a failure in its middle: chain with && or return.
step() {
    local what="$1" start=$SECONDS out
    shift
    log "$what ..."
    out="$(mktemp)"
    if "$@" >"$out" 2>&1; then
        log "$what: done in $((SECONDS - start)) s"
        rm -f "$out"
        return 0
    fi
    cat "$out" >&2
    rm -f "$out"
    die "$what: failed after $((SECONDS - start)) s"
}

# need_packages PACKAGE...: installs the Debian packages that are missing.
# Touches the network only if one is.
need_packages() {
    local missing=() p
    for p in "$@"; do
        [[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" == installed ]] || missing+=("$p")
    done
    ((${#missing[@]})) || return 0
    [[ $EUID == 0 ]] || die "packages are missing; run as root: apt-get install ${missing[*]}"
    step "apt-get update" apt-get update -q
    step "installing ${missing[*]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qy --no-install-recommends "${missing[@]}"
}

# debian_mirror: prints the Debian archive this machine is configured to use.
debian_mirror() {
    local uri
    # shellcheck disable=SC2016 # $(...) is apt's own syntax here
    uri="$(apt-get indextargets --format '$(COMPONENT) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk '$1 == "main" && $2 ~ /\/debian\/?$/ { print $2; exit }')" || uri=
    [[ -n "$uri" ]] || die "apt has no Debian archive configured: add one to its sources and run apt-get update"
    echo "$uri"
}

# debian_source DIRECTORY SUITE PACKAGE: downloads the upstream part of a source
# package, PACKAGE_*.orig.tar.*, of a release of Debian to a directory.
debian_source() {
    local dir="$1" suite="$2" package="$3" apt
    mkdir -p "$dir/lists/partial"
    cat >"$dir/source.sources" <<END
Types: deb-src
URIs: $(debian_mirror)
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
    apt=(apt-get -q -o "Dir::Etc::sourcelist=$dir/source.sources" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$dir/lists" -o APT::Sandbox::User=root)
    "${apt[@]}" update && (cd "$dir" && "${apt[@]}" source --download-only --only-source "$package")
}

# key INPUT...: prints a hash of strings and (for arguments that name files)
# of their contents; it identifies what an artefact was made from.
key() {
    local i
    for i in "$@"; do
        if [[ -f "$i" ]]; then cat "$i"; else printf '%s\0' "$i"; fi
    done | sha256sum | cut -c1-16
}

# artifact DIRECTORY KEY FUNCTION: makes sure that DIRECTORY holds the artefact
# with that KEY. If not, calls FUNCTION with the name of an empty temporary
# directory to fill, and puts that in DIRECTORY's place only when it is
# complete. Safe against interruption and against other processes doing the same.
artifact() {
    local dir="$1" key="$2" build="$3" lock tmp start=$SECONDS
    mkdir -p "$(dirname "$dir")"
    exec {lock}>"$dir.lock"
    flock -n "$lock" || { log "waiting for another process that builds $dir"; flock "$lock"; }
    if [[ "$(cat "$dir/.key" 2>/dev/null)" == "$key" ]]; then
        log "$dir: up to date"
    else
        discard "$dir".new.*
        tmp="$(mktemp -d "$dir.new.XXXXXX")"
        chmod 0755 "$tmp"
        "$build" "$tmp"
        echo "$key" >"$tmp/.key"
        if [[ -e "$dir" ]]; then mv "$dir" "$tmp.old"; fi
        mv "$tmp" "$dir"
        discard "$tmp.old"
        log "$dir: ready after $((SECONDS - start)) s"
    fi
    exec {lock}>&-
}

# adopt DIRECTORY KEY "NAME PACKAGE"...: gives the KEY to a DIRECTORY without
# one if it holds all the programs, built from the versions of the packages
# that the module in the current directory pins.
adopt() {
    local dir="$1" key="$2" program name package want binary
    [[ -d "$dir" && ! -e "$dir/.key" ]] || return 0
    shift 2
    for program in "$@"; do
        read -r name package <<<"$program"
        binary="$dir/$name"
        [[ -x "$binary" ]] || binary="$dir/bin/$name"
        [[ -x "$binary" ]] || return 0
        want="$(go list -f '{{.Module.Path}} {{.Module.Version}}' "$package")" || return 0
        go version -m "$binary" | awk '$1 == "mod" { print $2, $3 }' | grep -qxF "$want" || return 0
    done
    log "$dir: built from the wanted versions already"
    echo "$key" >"$dir/.key"
}

# discard PATH...: removes trees, but never what is mounted inside them.
discard() { rm -rf --one-file-system -- "$@"; }
