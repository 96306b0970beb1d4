@setlocal
@set "CARD=a6000"
@set "VRAM=48GB"
@call "%~dp0launch.bat" %*
