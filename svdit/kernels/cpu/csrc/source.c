/* Which sources this library was made from; build.py compares, and loads the OpenMP runtime that the library does not name. */
#ifndef SVDIT_SOURCE
#define SVDIT_SOURCE ""
#endif
__attribute__((visibility("default"))) const char *svdit_source(void) { return SVDIT_SOURCE; }
