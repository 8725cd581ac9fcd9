# shellcheck shell=bash
# Functions that make what a test VM boots: a kernel of Debian's with some of
# its modules, and an initramfs. Source this file after lib.sh.

# apt_private DIRECTORY COMMAND...: runs an apt command with package lists
# kept in DIRECTORY, apart from this machine's own.
apt_private() {
    local dir="$1" command="$2"
    shift 2
    "$command" -q -o Dir::State="$dir" -o Dir::State::status="$dir/status" -o Dir::Cache="$dir" \
        -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o APT::Architecture=amd64 -o APT::Sandbox::User=root "$@"
}

# extract_modules TREE KERNEL DIRECTORY MODULE...: copies the modules with all
# they depend on, uncompressed, and writes down the order to load them in.
extract_modules() {
    local lib="$1" release="$2" to="$3" name path
    shift 3
    for name; do
        modprobe --set-version "$release" --dirname "$lib" --show-depends "$name" |
            awk '$1 == "insmod" { print $2 }'
    done | awk '!seen[$0]++' | while read -r path; do
        name="$(basename "${path%.xz}")"
        case "$path" in
        *.xz) xz -dc "$path" >"$to/$name" ;;
        *) cp "$path" "$to/$name" ;;
        esac
        echo "$name"
    done >"$to/modules.order"
    [[ -s "$to/modules.order" ]]
}

# debian_kernel RELEASE DIRECTORY MODULE...: puts the kernel of a Debian release
# with the modules into DIRECTORY: vmlinuz, modules/*.ko, modules/modules.order
# (the order to load them in) and version (package and kernel release).
debian_kernel() {
    local release="$1" to="$2" mirror apt deb package kernel
    shift 2
    need_packages debian-archive-keyring kmod xz-utils
    mirror="$(debian_mirror)"
    apt="$(mktemp -d)"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/tree"
    : >"$apt/status"
    echo "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" >"$apt/sources.list"
    step "$release: package lists from $mirror" apt_private "$apt" apt-get update
    # linux-image-amd64 is a metapackage; the kernel itself is what it depends on.
    package="$(apt_private "$apt" apt-cache depends --important linux-image-amd64 |
        awk '$1 == "Depends:" { print $2; exit }')"
    [[ -n "$package" ]] || die "$release: no kernel behind linux-image-amd64 at $mirror"
    (cd "$apt" && step "$release: downloading $package" apt_private "$apt" apt-get download "$package")
    deb="$(ls "$apt"/*.deb)"
    step "$release: unpacking" dpkg-deb -x "$deb" "$apt/tree"
    kernel="${package#linux-image-}"
    # modprobe looks below lib, where older packages have it; newer ones use usr/lib.
    [[ -e "$apt/tree/lib" ]] || ln -s usr/lib "$apt/tree/lib"
    depmod --basedir "$apt/tree" "$kernel"
    mkdir "$to/modules"
    extract_modules "$apt/tree" "$kernel" "$to/modules" "$@" || die "$release: $kernel lacks one of: $*"
    cp "$apt/tree/boot/vmlinuz-$kernel" "$to/vmlinuz"
    chmod 0644 "$to/vmlinuz"
    echo "$package $(dpkg-deb -f "$deb" Version) $kernel" >"$to/version"
    discard "$apt"
}

# initramfs DIRECTORY INIT MKINITRAMFS: makes DIRECTORY/initramfs-HASH.gz of the
# init and the directory's modules, unless it is there, and the link
# initramfs.gz to it.
initramfs() {
    local dir="$1" init="$2" mkinitramfs="$3" name tmp
    name="initramfs-$(key "$init" "$mkinitramfs" "$dir/.key").gz"
    tmp="$dir/.new.$$"
    if [[ ! -e "$dir/$name" ]]; then
        "$mkinitramfs" "$tmp" "$init" "$dir/modules"
        mv "$tmp" "$dir/$name"
    fi
    ln -s "$name" "$tmp"
    mv -T "$tmp" "$dir/initramfs.gz"
    find "$dir" -name 'initramfs-*.gz' -mtime +7 ! -name "$name" -delete
    log "$dir/$name: ready"
}

# build_init PACKAGE DIRECTORY: builds the init of a VM, and mkinitramfs.
build_init() {
    cd "$ROOT" &&
        GOOS=linux GOARCH=amd64 CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags='-s -w' -o "$2/init" "$1" &&
        CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$2/mkinitramfs" ./hack/mkinitramfs
}
