/* Runs functions of a shared library on another processor, on behalf of guest.py: `guest LIBRARY` reads calls from the
   standard input and writes results to the standard output, numbers as int64. A call is: the buffers (their number, and
   of each its size and bytes), the pointers in them (their number, and of each: buffer, offset; buffer, offset that it
   leads to), the function (length and name), and six arguments (buffer or -1; offset, or the number itself). The result is
   the function's, followed by the buffers. Every buffer ends where no memory is mapped; what lies between it and the end
   of its last 64 bytes must not change. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGNMENT = 64, PAGE = 65536, UNTOUCHED = 0xa5, ARGUMENTS = 6 };

typedef struct {
    int64_t size, mapped;
    char *start, *memory;
} Buffer;

static void need(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "guest: %s\n", what);
        exit(1);
    }
}

static void get(void *to, int64_t size) { need(fread(to, 1, (size_t)size, stdin) == (size_t)size, "the call is incomplete"); }
static void put(const void *from, int64_t size) { need(fwrite(from, 1, (size_t)size, stdout) == (size_t)size, "no room"); }
static int64_t number(void) { int64_t n; get(&n, sizeof n); return n; }

static Buffer receive(void)
{
    Buffer b = {.size = number()};
    int64_t whole = (b.size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, pages = (whole + PAGE - 1) / PAGE * PAGE;
    b.mapped = pages + PAGE;
    b.memory = mmap(0, (size_t)b.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(b.memory != MAP_FAILED && !mprotect(b.memory + pages, PAGE, PROT_NONE), "no memory");
    b.start = b.memory + pages - whole;
    get(b.start, b.size);
    memset(b.start + b.size, UNTOUCHED, (size_t)(whole - b.size));
    return b;
}

static void answer(Buffer *b)
{
    for (char *p = b->start + b->size; p < b->memory + b->mapped - PAGE; p++)
        need(*(uint8_t *)p == UNTOUCHED, "something was written behind a buffer");
    put(b->start, b->size);
    munmap(b->memory, (size_t)b->mapped);
}

int main(int count, char **names)
{
    need(dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL) != 0, "there is no OpenMP runtime");
    void *library = count == 2 ? dlopen(names[1], RTLD_NOW) : 0;
    need(library != 0, count == 2 ? dlerror() : "usage: guest LIBRARY");
    for (int64_t buffers; fread(&buffers, sizeof buffers, 1, stdin) == 1; fflush(stdout)) {
        Buffer *all = calloc((size_t)buffers + 1, sizeof *all);
        for (int64_t i = 0; i < buffers; i++) all[i] = receive();
        for (int64_t left = number(); left > 0; left--) {
            char *at = all[number()].start;
            at += number();
            char *to = all[number()].start;
            to += number();
            memcpy(at, &to, sizeof to);
        }
        char name[100] = "";
        int64_t a[ARGUMENTS], length = number();
        need(length < (int64_t)sizeof name, "the name is too long");
        get(name, length);
        for (int i = 0; i < ARGUMENTS; i++) {
            int64_t buffer = number(), value = number();
            a[i] = buffer < 0 ? value : (int64_t)(intptr_t)(all[buffer].start + value);
        }
        int (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
        *(void **)&function = dlsym(library, name);
        need(function != 0, "there is no such function");
        int64_t result = function(a[0], a[1], a[2], a[3], a[4], a[5]);
        put(&result, sizeof result);
        for (int64_t i = 0; i < buffers; i++) answer(all + i);
        free(all);
    }
    return 0;
}
